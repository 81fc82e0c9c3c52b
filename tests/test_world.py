"""The built-in world: its splits hold what they promise, and no shortcut solves them."""

import hashlib
import json
import os
import re
import subprocess
import sys
from collections import Counter, defaultdict
from functools import cache
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

import world
from evaluate import find_flips, load_preferences

SPLITS = tuple(world.SPLITS)
VALUES = [value for values in world.AXES.values() for value in values]


@cache
def training():
    return world.training_pairs()


@cache
def sft():
    return world.sft_rows()


@cache
def split_rows(split):
    return world.evaluation_pairs(split)


def evaluation():
    return [row for split in SPLITS for row in split_rows(split)]


read_style = cache(lambda text: tuple(world.read_style(text).items()))


def style_of(text):
    return dict(read_style(text))


def meta_text(row):
    return " ".join(row[tier] for tier in ("system", "preference") if tier in row)


# ---------------------------------------------------------------- reading a meta-prompt

KEYWORD_VALUE = {k: value for value, text in world.KEYWORDS.items() for k in text.split("|")}
TEMPLATES = [
    (template, re.compile(re.escape(template).replace(r"\{\}", "(.+)").replace(r"\[\]", "(.+)")))
    for template in world.USER_TEMPLATES + world.SYSTEM_TEMPLATES
]
BACKGROUND_VALUE = {
    background: value
    for value, sets in world.BACKGROUNDS.items()
    for backgrounds in sets
    for background in backgrounds.split("|")
}


@cache
def mentions(text):
    """[(template, keyword), ...] of a tier's text, read without the code that wrote it."""
    found = []
    for sentence in re.split(r"(?<=\.) ", text):
        for template, pattern in TEMPLATES:
            match = pattern.fullmatch(sentence)
            keywords = re.split(r", | and ", match[1]) if match else []
            if keywords and all(keyword in KEYWORD_VALUE for keyword in keywords):
                found += [(template, keyword) for keyword in keywords]
    return found


def stated_values(text):
    """{axis: value} that a tier's text asks for in so many words; no background, no priority."""
    values = {}
    for template, keyword in mentions(text):
        value = KEYWORD_VALUE[keyword]
        value = world.OPPOSITE[value] if "[]" in template else value
        values[world.AXIS_OF[value]] = value
    return values


def mentioned_axes(row):
    """Axes of which a row's meta-prompt speaks, stated or implied."""
    text = meta_text(row)
    axes = {world.AXIS_OF[KEYWORD_VALUE[keyword]] for _, keyword in mentions(text)}
    return axes | {world.AXIS_OF[v] for b, v in BACKGROUND_VALUE.items() if b in text}


def test_meta_prompts_are_read_completely():
    """The tests below look at meta-prompts through `mentions`, so it must miss nothing."""
    for row in [*training(), *evaluation()]:
        assert mentioned_axes(row) == set(row["meta"]["values"]), meta_text(row)


# ---------------------------------------------------------------- questions


@cache
def task_and_topic(question):
    """(task, topic) of a question, found by trying every one."""
    for kind, topics in world.TOPICS.items():
        for topic in topics.split("|"):
            for task in world.TASKS[kind]:
                do = task.format(x=topic)
                if question in (q.format(do=do) for q in world.QUESTIONS):
                    return task, topic
    raise AssertionError(question)


def test_no_evaluation_question_occurs_in_training():
    known = {row["prompt"] for row in [*training(), *sft()]}
    new = {row["prompt"] for row in evaluation()}
    assert not known & new
    assert not set(map(task_and_topic, known)) & set(map(task_and_topic, new))


@pytest.mark.parametrize("name", world.DATA)
def test_what_scripts_evaluate_asks_nothing_that_they_train_on(name):
    """By the names that scripts know the data by."""
    makers = [world.DATA[name][0], *world.SFT_DATA.values()]
    known = {row["prompt"] for make in makers for row in make()}
    sets = load_preferences(name)
    assert [split for split, _ in sets] == (list(SPLITS) if name == "world" else [name])
    for _, rows in sets:
        assert rows and not known & {row["prompt"] for row in rows}


def test_every_task_and_topic_of_evaluation_is_known_from_training():
    """What is new is the question, not its words."""
    known = set(map(task_and_topic, {row["prompt"] for row in training()}))
    new = set(map(task_and_topic, {row["prompt"] for row in evaluation()}))
    assert {task for task, _ in new} <= {task for task, _ in known}
    assert {topic for _, topic in new} <= {topic for _, topic in known}


# ---------------------------------------------------------------- what each split promises


def test_unseen_wording_joins_known_templates_and_keywords_anew():
    known = {pair for row in [*training(), *sft()] for pair in mentions(meta_text(row))}
    trained = {pair for row in training() for pair in mentions(meta_text(row))}
    new = [pair for row in split_rows("unseen_wording") for pair in mentions(meta_text(row))]
    assert not known & set(new)
    assert {template for template, _ in new} <= {template for template, _ in trained}
    assert {keyword for _, keyword in new} <= {keyword for _, keyword in trained}
    assert len(set(new)) > 50  # not the same few again and again


def test_seen_wordings_are_seen():
    """In `seen` all of them; elsewhere one in a hundred may be missing from training by chance."""
    trained = {pair for row in training() for pair in mentions(meta_text(row))}
    for split in ("seen", "unseen_combination", "priority", "several_systems"):
        used = [pair for row in split_rows(split) for pair in mentions(meta_text(row))]
        unknown = [pair for pair in used if pair not in trained]
        assert len(unknown) <= (0 if split == "seen" else len(used) // 100), unknown


def test_seen_states_one_to_three_axes():
    assert {len(row["meta"]["values"]) for row in split_rows("seen")} == {1, 2, 3}


def test_unseen_combination_mentions_axes_that_training_keeps_apart():
    held_out = [frozenset(pair) for pair in world.HELD_OUT_AXES]
    for row in [*training(), *sft()]:
        assert not any(pair <= mentioned_axes(row) for pair in held_out), meta_text(row)
    found = Counter()
    for row in split_rows("unseen_combination"):
        pairs = [pair for pair in held_out if pair <= mentioned_axes(row)]
        assert pairs, meta_text(row)
        found.update(pairs)
    assert set(found) == set(held_out)  # each of them is tested


def test_implied_backgrounds_are_known_and_name_no_keyword():
    texts = [row["preference"] for row in training() if row["meta"]["split"] == "implied"]
    known = {b for b in BACKGROUND_VALUE if any(b in text for text in texts)}
    used = {b for row in split_rows("implied") for b in BACKGROUND_VALUE if b in row["preference"]}
    assert used <= known
    for split in ("implied", "unseen_implied"):
        for row in split_rows(split):
            assert not mentions(meta_text(row))
            assert not any(re.search(rf"\b{k}\b", meta_text(row)) for k in KEYWORD_VALUE)


def test_unseen_backgrounds_are_new_and_made_of_known_words():
    known = [meta_text(row) for row in [*training(), *sft()]]
    words = {w for row in training() for w in re.findall(r"[\w']+", meta_text(row).lower())}
    new = {b for sets in world.BACKGROUNDS.values() for b in sets[1].split("|")}
    used = {b for row in split_rows("unseen_implied") for b in new if b in row["preference"]}
    assert used
    for background in new:
        assert not any(background in text for text in known)
        assert set(re.findall(r"[\w']+", background.lower())) <= words, background
    for row in split_rows("unseen_implied"):
        assert all(b not in row["preference"] for sets in world.BACKGROUNDS.values()
                   for b in sets[0].split("|"))


def test_priority_is_won_by_each_tier_in_half_of_the_rows():
    rows = split_rows("priority")
    system_is_right = user_is_right = says_system = 0
    for row in rows:
        [(axis, value)] = row["meta"]["values"].items()
        system, user = stated_values(row["system"])[axis], stated_values(row["preference"])[axis]
        assert system == world.OPPOSITE[user]
        assert style_of(row["chosen"])[axis] == value != style_of(row["rejected"])[axis]
        system_is_right += system == value
        user_is_right += user == value
        rules = world.LAST_WORD["system"].split("|")
        says_system += any(row["system"].endswith(rule) for rule in rules)
        assert (system == value) == any(row["system"].endswith(rule) for rule in rules)
    assert system_is_right == user_is_right == says_system == len(rows) / 2


def test_several_systems_rejects_what_another_system_message_chose():
    rows, chosen_under, systems = split_rows("several_systems"), defaultdict(set), defaultdict(set)
    for row in rows:
        assert "preference" not in row
        chosen_under[row["prompt"], row["chosen"]].add(row["system"])
        systems[row["prompt"]].add(row["system"])
    for row in rows:
        assert chosen_under[row["prompt"], row["rejected"]] - {row["system"]}
    complete = [question for question in systems if len(systems[question]) >= 3]
    assert len(complete) >= len(systems) - 1  # the last question may be cut short


# ---------------------------------------------------------------- pairs


@pytest.mark.parametrize("split", ("training", *SPLITS))
def test_every_pair_stands_in_both_orders(split):
    rows = training() if split == "training" else split_rows(split)
    assert len(rows) == (world.TRAIN_ROWS if split == "training" else world.EVAL_ROWS)
    flips = find_flips(rows)
    assert sorted(i for flip in flips for i in flip) == list(range(len(rows)))
    for i, j in flips:
        assert (rows[i]["chosen"], rows[i]["rejected"]) == (rows[j]["rejected"], rows[j]["chosen"])
        assert meta_text(rows[i]) != meta_text(rows[j])


def steps_of(text):
    """The steps of an answer, whatever its style, in lower case."""
    bullets = re.findall(r"^- (.+)$", text, re.M)
    if bullets:
        return [step.lower() for step in bullets]
    sentences = re.split(r"(?<=[.!?]) ", text)
    second = next(i for i, s in enumerate(sentences) if s.startswith("Then "))
    found = [sentences[second - 1]]
    for sentence in sentences[second:]:
        if not re.match(r"Then |Next, |Finally, ", sentence):
            break
        found.append(re.sub(r"^(Then|Next,|Finally,) ", "", sentence))
    return [step.rstrip(".").lower() for step in found]


def test_answers_differ_in_stated_style_and_not_in_content():
    for row in [*training(), *evaluation()]:
        chosen, rejected = style_of(row["chosen"]), style_of(row["rejected"])
        differ = [axis for axis in world.AXES if chosen[axis] != rejected[axis]]
        assert differ and differ == row["meta"]["differ"]
        assert set(differ) <= set(row["meta"]["values"])
        assert all(chosen[axis] == v for axis, v in row["meta"]["values"].items())
        one, other = sorted((steps_of(row["chosen"]), steps_of(row["rejected"])), key=len)
        assert other[: len(one)] == one
        assert ("length" in differ) == (len(one) != len(other))


def test_every_answer_is_on_topic():
    for row in [*training(), *evaluation()]:
        assert world.on_topic(row["prompt"], row["chosen"])
    for row, following in pairwise(sft()):
        assert world.on_topic(row["prompt"], row["response"])
        if task_and_topic(row["prompt"])[0] != task_and_topic(following["prompt"])[0]:
            assert not world.on_topic(row["prompt"], following["response"])


# ---------------------------------------------------------------- the checker


def test_checker_reads_every_answer():
    """The writer's own style comes back for every answer, in all 32 styles."""
    styles = set()
    for row in sft():
        style = style_of(row["response"])
        assert None not in style.values(), row["response"]
        styles.add(tuple(style.values()))
    assert len(styles) == 32
    rng = world.Random(0)
    for _ in range(2000):
        content = world.draw_content(rng, rng.random() < 0.5)
        style = {axis: rng.choice(values) for axis, values in world.AXES.items()}
        assert world.read_style(world.write_answer(content, style)) == style


def both(a, b, **fixed):
    """An answer in each of two styles that differ on axes given as value pairs."""
    rng = world.Random(1)
    content = world.draw_content(rng, False)
    return [world.write_answer(content, style) for style in (a | fixed, b | fixed)]


PLAIN = {"length": "brief", "format": "prose", "tone": "formal", "certainty": "confident",
         "ending": "wish"}


@pytest.mark.parametrize("axis", world.AXES)
def test_checker_gives_none_to_a_text_of_both_styles(axis):
    other = PLAIN | {axis: world.OPPOSITE[PLAIN[axis]]}
    one, two = both(PLAIN, other)
    if axis == "ending":  # the end of one, cut off, is neither a question nor a wish
        mixed = one[: one.rindex(".", 0, -1) + 1]
    elif axis == "length":  # three steps are neither
        mixed = re.sub(r"Finally,.*?\. ", "", two)
        assert mixed != two
    else:
        mixed = f"{one} {two}" if axis != "format" else f"{two}\n{one}"
    assert world.read_style(mixed)[axis] is None, mixed


def test_checker_gives_none_to_a_text_without_a_style():
    for text in ("", "...", "lamp lamp the of of rug", "- - -\n\n-", "Yes."):
        assert set(world.read_style(text).values()) == {None}, text


@pytest.mark.parametrize("value", VALUES)
def test_checker_hears_a_change_of_one_axis_only(value):
    axis = world.AXIS_OF[value]
    one, two = both(PLAIN | {axis: value}, PLAIN | {axis: world.OPPOSITE[value]})
    a, b = world.read_style(one), world.read_style(two)
    assert {x for x in world.AXES if a[x] != b[x]} == {axis} and a[axis] == value


# ---------------------------------------------------------------- determinism


def digest(rows):
    return hashlib.sha256(json.dumps(rows, sort_keys=True).encode()).hexdigest()


def test_rows_are_the_same_in_a_fresh_process():
    code = (
        "import hashlib, json, world\n"
        "rows = [world.training_pairs(), world.sft_rows(),"
        " [world.evaluation_pairs(s) for s in world.SPLITS]]\n"
        "print(hashlib.sha256(json.dumps(rows, sort_keys=True).encode()).hexdigest())"
    )
    here = digest([training(), sft(), [split_rows(split) for split in SPLITS]])
    found = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True,
        cwd=Path(world.__file__).parent, env=os.environ | {"PYTHONHASHSEED": "7"},
    )
    assert found.stdout.strip() == here


# ---------------------------------------------------------------- shortcuts

# A shortcut is a function (row, answer) -> score; it never learns which answer is chosen.


def longer(row, answer):
    return len(answer)


def first_style(row, answer):
    style = style_of(answer)
    return sum(style[axis] == first for axis, (first, _) in world.AXES.items())


def always_system(row, answer):
    style = style_of(answer)
    return sum(style[axis] == v for axis, v in stated_values(row.get("system", "")).items())


def always_user(row, answer):
    style = style_of(answer)
    return sum(style[axis] == v for axis, v in stated_values(row.get("preference", "")).items())


@cache
def keyword_counts():
    """{(keyword, value): training rows with this keyword whose chosen answer has this value}."""
    counts = Counter()
    for row in training():
        style = style_of(row["chosen"])
        for keyword in keywords_in(meta_text(row)):
            counts[keyword, style[world.AXIS_OF[KEYWORD_VALUE[keyword]]]] += 1
    return counts


@cache
def keywords_in(text):
    return [k for k in KEYWORD_VALUE if re.search(rf"\b{k}\b", text)]


def keyword_lookup(row, answer):
    """Sum of log-odds of the answer's values over the keywords, whatever stands around them."""
    style, score = style_of(answer), 0.0
    for keyword in keywords_in(meta_text(row)):
        value = style[world.AXIS_OF[KEYWORD_VALUE[keyword]]]
        for_it = keyword_counts()[keyword, value]
        against = keyword_counts()[keyword, world.OPPOSITE[value]]
        score += np.log((for_it + 1) / (against + 1))
    return score


def words_of(row, with_tier):
    return {f"{tier if with_tier else ''}:{word}" for tier in ("system", "preference")
            for word in re.findall(r"[\w']+", row.get(tier, "").lower())}


@cache
def word_weights(with_tier):
    """Logistic regression of each axis on the words of the meta-prompt: ({word: i}, {axis: w})."""
    rows, vocabulary = training(), {}
    for row in rows:
        for word in words_of(row, with_tier):
            vocabulary.setdefault(word, len(vocabulary))
    features = np.zeros((len(rows), len(vocabulary) + 1), dtype=np.float32)
    features[:, -1] = 1
    for i, row in enumerate(rows):
        features[i, [vocabulary[word] for word in words_of(row, with_tier)]] = 1
    weights = {}
    for axis, (first, _) in world.AXES.items():
        of = [i for i, row in enumerate(rows) if axis in row["meta"]["differ"]]
        x = features[of]
        y = np.array([style_of(rows[i]["chosen"])[axis] == first for i in of], dtype=np.float32)
        w, speed = np.zeros(x.shape[1], dtype=np.float32), 0
        for _ in range(300):  # gradient ascent with momentum and a little decay
            p = 1 / (1 + np.exp(-(x @ w)))
            speed = 0.9 * speed + x.T @ (y - p) / len(of) - 1e-4 * w
            w = w + speed
        weights[axis] = w
    return vocabulary, weights


def bag_of_words(row, answer, with_tier=False):
    vocabulary, weights = word_weights(with_tier)
    known = [vocabulary[w] for w in words_of(row, with_tier) if w in vocabulary]
    style, score = style_of(answer), 0.0
    for axis in row["meta"]["differ"]:
        logit = weights[axis][known].sum() + weights[axis][-1]
        score += logit if style[axis] == world.AXES[axis][0] else -logit
    return score


def bag_of_words_by_tier(row, answer):
    return bag_of_words(row, answer, with_tier=True)


SHORTCUTS = (longer, first_style, always_system, always_user, keyword_lookup, bag_of_words,
             bag_of_words_by_tier)


@cache
def measure(shortcut, split):
    """(accuracy, flip accuracy) of a shortcut; between equal scores it takes the first by name."""
    rows = split_rows(split)
    right = []
    for row in rows:
        answers = sorted((row["chosen"], row["rejected"]))
        right.append(max(answers, key=lambda a: shortcut(row, a)) == row["chosen"])
    return np.mean(right), np.mean([right[i] and right[j] for i, j in find_flips(rows)])


def test_no_shortcut_solves_every_split(capsys):
    """Prints the table; the weakest split of each shortcut is `priority`, near chance."""
    table = {(f, split): measure(f, split) for f in SHORTCUTS for split in SPLITS}
    with capsys.disabled():
        print("\n\naccuracy / flip accuracy of shortcuts, percent")
        print(" " * 18 + "".join(f"{f.__name__:>22}" for f in SHORTCUTS))
        for split in SPLITS:
            found = [table[shortcut, split] for shortcut in SHORTCUTS]
            cells = [f"{100 * accuracy:.1f} / {100 * flips:.1f}" for accuracy, flips in found]
            print(f"{split:<18}" + "".join(f"{cell:>22}" for cell in cells))
    for shortcut in SHORTCUTS:
        assert min(table[shortcut, split][0] for split in SPLITS) <= 0.6


# The bounds lie a margin above what is measured; the world is fixed, so they are no matter of luck.


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("shortcut", [longer, first_style])
def test_a_shortcut_that_ignores_the_preference_is_at_chance(shortcut, split):
    """It ranks two answers alike in both rows of a flip, so it has exactly one of them right."""
    assert measure(shortcut, split) == (0.5, 0.0)


@pytest.mark.parametrize("shortcut", [always_system, always_user])
def test_always_obeying_one_tier_scores_half_on_priority(shortcut):
    assert measure(shortcut, "priority") == (0.5, 0.0)


@pytest.mark.parametrize("split", ["implied", "unseen_implied"])
def test_keyword_lookup_finds_nothing_in_a_background(split):
    assert measure(keyword_lookup, split) == (0.5, 0.0)


@pytest.mark.parametrize("shortcut", [keyword_lookup, bag_of_words, bag_of_words_by_tier])
def test_words_alone_are_near_chance_on_priority(shortcut):
    """Who wins turns a word's meaning around, which no sum over words can express."""
    accuracy, flips = measure(shortcut, "priority")
    assert 0.4 <= accuracy <= 0.6 and flips <= 0.35


@pytest.mark.parametrize("split", ["seen", "unseen_wording", "unseen_combination"])
@pytest.mark.parametrize("shortcut", [keyword_lookup, bag_of_words, bag_of_words_by_tier])
def test_words_alone_do_not_solve_stated_preferences(shortcut, split):
    """They fall for "Please avoid ..."; yet they learn much, so the shortcut is a fair one."""
    accuracy, flips = measure(shortcut, split)
    assert 0.65 <= accuracy <= 0.9 and flips <= 0.8
