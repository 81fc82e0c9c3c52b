"""The real result: politeness, length and personas for a pretrained chat model.

    python real.py --data $DATA            # writes out/real/*.jsonl, prints the length-only rule
    python real.py --ckpt out/real-dpo     # generated answers to held-out prompts

$DATA has the folders polite, concise and personas, each with train.jsonl and val.jsonl of data.py's
record; meta.preference_name names the side, meta.wording (of the first two) is stated or implied,
meta.dataset is the source. Some wordings and personas never enter training, so that following
unseen ones can be measured.
"""

import itertools
import json
import random
import re
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

import common
import data
import evaluate
from common import UserError
from model import for_inference
from sample import answer_tokens, load_checkpoint


@dataclass(frozen=True)
class Options:
    """Write the training and evaluation files, or with --ckpt look at what a model answers."""

    data: str = ""  # folder with polite, concise and personas, each with train.jsonl and val.jsonl
    out_dir: str = "out/real"  # folder of the files
    polite_copies: int = 3  # how often a politeness pair occurs, in wordings drawn anew
    concise_copies: int = 2  # the same for a pair of length
    concise_pairs: int = 1000  # how many pairs of length of at most concise_size characters
    concise_size: int = 4000  # prompt, preference and both answers together
    personas_pairs: int = 600  # how many pairs of statements
    seed: int = 0  # of what is held out and drawn
    ckpt: str = ""  # answer held-out prompts with this checkpoint instead
    device: str = "auto"  # auto, cpu, cuda, cuda:N, mps
    precision: str = "auto"  # auto, bf16, fp16, fp32

    def __post_init__(self):
        common.at_least(
            self, 0, "polite_copies", "concise_copies", "concise_pairs", "concise_size",
            "personas_pairs", "seed",
        )


# Datasets in which a preference has many wordings, and its sides.
WORDED = {"polite": ("polite", "blunt"), "concise": ("concise", "detailed")}
HELD_OUT = {"stated": 5, "implied": 3}  # wordings of each preference that training never shows
HELD_OUT_PERSONAS = 6
UNSEEN_ROWS = 160  # held-out rows that are asked again under unseen wordings

# ---------------------------------------------------------------- training and evaluation files


def read(folder, name, split):
    """Records of one file, whose meta must name the preference and, in WORDED, its wording."""
    records = data.read_records(str(Path(folder) / name / f"{split}.jsonl"))
    known = {"preference_name": WORDED.get(name)}  # None: any text
    known |= {"wording": tuple(HELD_OUT)} if name in WORDED else {}
    for record in records:
        where, meta = record["where"], record.get("meta", {})
        data.text_field(record.get("preference"), "preference", where)
        for field, values in known.items():
            value = data.text_field(meta.get(field), f"meta.{field}", where)
            if values and value not in values:
                raise UserError(f"{where}: field 'meta.{field}': must be {' or '.join(values)}")
    return records


def flips(records):
    return [[records[i], records[j]] for i, j in evaluate.find_flips(records)]


def stems(text):
    """The first four letters of each word that has as many."""
    return set(re.findall(r"\b[a-z]{4}", text.lower()))


def wordings(records, rng):
    """(wordings to train on, wordings held out), each {(preference_name, kind): [text]}.

    Beside the data's own, training has those of wordings.json, written for this purpose. Implied
    ones that share a stem with an implied one held out of their side are left out: they may be
    paraphrases of it.
    """
    more = common.load_json(Path(__file__).with_name("wordings.json"))
    found = defaultdict(set)
    for record in records:
        meta = record["meta"]
        found[meta["preference_name"], meta["wording"]].add(record["preference"])
    seen, unseen = {}, {}
    for (name, kind), texts in sorted(found.items()):
        texts = rng.sample(sorted(texts), len(texts))
        unseen[name, kind] = texts[: HELD_OUT[kind]]
        ours = [text for text in more[name][kind] if text not in unseen[name, kind]]
        seen[name, kind] = texts[HELD_OUT[kind] :] + ours
        if kind == "implied":
            taken = set().union(*map(stems, unseen[name, kind]))
            seen[name, kind] = [text for text in seen[name, kind] if taken.isdisjoint(stems(text))]
    return seen, unseen


def reworded(record, texts, kind, rng):
    """The same row under another wording of the same preference."""
    name = record["meta"]["preference_name"]
    meta = record["meta"] | {"wording": kind}
    return record | {"preference": rng.choice(texts[name, kind]), "meta": meta}


def worded_sets(folder, name, rng):
    """(training rows, function that rewords one, {evaluation set: rows}) of polite or concise."""
    train = read(folder, name, "train")
    seen, unseen = wordings(train, rng)
    for side, kind in itertools.product(WORDED[name], HELD_OUT):
        if (side, kind) not in seen:
            raise UserError(f"{folder}/{name}/train.jsonl: no {kind} wording of {side}")
    held_out = read(folder, name, "val")
    sets = {f"{name}-val": held_out}
    for kind in HELD_OUT:
        again = [reworded(record, unseen, kind, rng) for record in held_out[:UNSEEN_ROWS]]
        sets[f"{name}-unseen-{kind}"] = again
    return train, lambda row: reworded(row, seen, rng.choice(list(HELD_OUT)), rng), sets


def characters(record):
    texts = [turn["content"] for turn in data.prompt_turns(record)]
    return sum(map(len, [*texts, record["preference"], record["chosen"], record["rejected"]]))


def obeyed(record):
    """Whether the shorter answer goes with "concise"; in a ninth of the pairs it does not."""
    concise = record["meta"]["preference_name"] == "concise"
    return (len(record["chosen"]) < len(record["rejected"])) == concise


def personas_sets(folder, rng):
    """(training pairs, {evaluation set: rows}): no held-out persona is in a training pair."""
    pairs = flips(read(folder, "personas", "train"))
    names = [{record["meta"]["preference_name"] for record in pair} for pair in pairs]
    everyone = sorted(set().union(*names))
    if len(everyone) < HELD_OUT_PERSONAS:
        raise UserError(f"{folder}/personas/train.jsonl: {len(everyone)} personas in flips, "
                        f"{HELD_OUT_PERSONAS} are held out")
    held_out = set(rng.sample(everyone, HELD_OUT_PERSONAS))
    train = [pair for pair, who in zip(pairs, names, strict=True) if not who & held_out]
    unseen = [pair for pair, who in zip(pairs, names, strict=True) if who <= held_out]
    sets = {"personas-val": read(folder, "personas", "val"),
            "personas-unseen": [record for pair in unseen for record in pair]}
    return train, sets


def prepare(options):
    """{file name: rows} of the training file and of every evaluation set."""
    seed, train = options.seed, []
    rows, again, polite = worded_sets(options.data, "polite", random.Random(seed))
    train += map(again, rows * options.polite_copies)
    rows, again, concise = worded_sets(options.data, "concise", random.Random(seed))
    pairs = [pair for pair in flips(rows)
             if max(map(characters, pair)) <= options.concise_size and all(map(obeyed, pair))]
    pairs = random.Random(seed).sample(pairs, min(options.concise_pairs, len(pairs)))
    for pair in pairs * options.concise_copies:
        train += map(again, pair)
    pairs, personas = personas_sets(options.data, random.Random(seed))
    for pair in random.Random(seed).sample(pairs, min(options.personas_pairs, len(pairs))):
        train += pair
    return {"train": train} | polite | concise | personas


# ---------------------------------------------------------------- the length-only rule


def length_rule(records):
    """Flips that a rule gets right which reads the preference but only the answers' length.

    {`meta.dataset` or "all": (right, flips)}; the rule is shorter for the preference of the first
    name in alphabetical order (concise before detailed), longer for the other, or the reverse,
    whichever is right more often.
    """
    counts = defaultdict(list)
    for one, other in flips(records):
        first = min(one, other, key=lambda record: record["meta"]["preference_name"])
        longer = len(first["rejected"]) - len(first["chosen"])
        for group in {"all", str(first["meta"].get("dataset", "all"))}:
            counts[group].append((longer > 0) + (longer == 0) / 2)  # a tie counts half
    return {group: (max(sum(right), len(right) - sum(right)), len(right))
            for group, right in sorted(counts.items())}


def print_length_rule(sets):
    print("flips that the answers' length alone gets right, the better direction for each source")
    for name, records in sets.items():
        for group, (right, n) in length_rule(records).items():
            print(f"  {name:<24} {group:<32} {100 * right / n:5.1f} of {n}")


# ---------------------------------------------------------------- generated answers

PROMPTS, MAX_NEW_TOKENS = 20, 200  # how many of each, and the longest answer
ASKED = {"concise": ("Be concise.", "Be detailed."), "polite": ("Please be polite.", "Be blunt.")}


def first_prompts(records, n):
    """The first n different prompts, in the order of the file."""
    prompts = {json.dumps(record["prompt"]): record["prompt"] for record in records}
    return list(prompts.values())[:n]


def answer_both_ways(options):
    """Print greedy answers under opposite preferences, their mean lengths, how many are cut."""
    device = common.pick_device(options.device)
    precision = common.pick_precision(options.precision, device)
    model, tokenizer = load_checkpoint(options.ckpt, device, common.PRECISIONS[precision])
    model = for_inference(model, sampling=True)
    for name, preferences in ASKED.items():
        records = data.read_records(str(Path(options.out_dir) / f"{name}-val.jsonl"))
        prompts = first_prompts(records, PROMPTS)
        found = {}
        with common.autocast(device, precision):
            for preference in preferences:
                asked = [{"preference": preference, "prompt": prompt} for prompt in prompts]
                found[preference] = answer_tokens(model, tokenizer, asked, MAX_NEW_TOKENS)
        texts = {key: list(map(tokenizer.decode, answers)) for key, answers in found.items()}
        for i, prompt in enumerate(prompts):
            print(f"\n{prompt}")
            for preference in preferences:
                print(f"  [{preference}] {texts[preference][i]}")
        sizes = [sum(map(len, texts[preference])) / len(prompts) for preference in preferences]
        print(f"\n{name}: ratio of lengths {sizes[1] / max(sizes[0], 1):.2f}")
        for preference, size in zip(preferences, sizes, strict=True):
            cut = sum(len(tokens) == MAX_NEW_TOKENS for tokens in found[preference])
            print(f"  {preference!r}: {size:.0f} characters on average, {cut} of {len(prompts)} "
                  f"cut at {MAX_NEW_TOKENS} tokens")


def main(options):
    if options.ckpt:
        answer_both_ways(options)
        return
    if not options.data:
        raise UserError("--data or --ckpt is required")
    files = prepare(options)
    for name, records in files.items():
        path = Path(options.out_dir) / f"{name}.jsonl"
        data.save_records(path, records)
        print(f"wrote {path}: {len(records)} rows")
    print_length_rule({name: rows for name, rows in files.items() if name != "train"})


if __name__ == "__main__":
    common.run(main, Options)
