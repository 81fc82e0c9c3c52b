"""The built-in preference world: everyday questions, answers in 32 styles, preferences about style.

Everything is plain English made from one fixed seed. An answer's style is its value on five axes;
`read_style` reads it back from the text alone, so what a model writes can be scored. Questions of
the evaluation splits never occur in training, in any of their wordings.
"""

import itertools
import re
from collections import Counter, defaultdict
from functools import cache, partial
from random import Random

import regex  # comes with tiktoken

SEED = 20241021
TRAIN_ROWS, SFT_ROWS, EVAL_ROWS = 8000, 9000, 200  # EVAL_ROWS for each split
# Of users who state nothing. Each two opposite combinations of values are one couple to evaluate.
TRAIN_COUPLES, TRAIN_PAIRS, SFT_USERS, EVAL_COUPLES = 800, 2000, 1600, 16
FOLLOW_SHARE = 0.1  # in this share of the SFT rows a stated axis follows the meta-prompt on purpose
META_PROMPT_SHARE = 0.2  # how many SFT rows have a meta-prompt at all

AXES = {
    "length": ("brief", "detailed"),
    "format": ("list", "prose"),
    "tone": ("formal", "casual"),
    "certainty": ("confident", "cautious"),
    "ending": ("question", "wish"),
}
# Pairs of axes that no training preference mentions together; `unseen_combination` has one.
HELD_OUT_AXES = ({"length", "tone"}, {"format", "certainty"}, {"certainty", "ending"})

SPLITS = {
    "seen": "new questions, wordings that occur in training",
    "unseen_wording": "a template and a keyword that never occur together in training",
    "unseen_combination": "axes that are never mentioned together in training",
    "implied": "a background that implies the style, known from training",
    "unseen_implied": "a new background, made of known words",
    "priority": "system and user disagree; a stated rule says who has the last word",
    "several_systems": "the rejected answer was written for another system message",
}

# ---------------------------------------------------------------- questions and their content

TOPICS = {
    "thing": "the kettle|the bicycle|the laptop|the sofa|the tent|the guitar|the camera|"
    "the backpack|the lamp|the rug|the umbrella|the suitcase",
    "plant": "the tomatoes|the basil|the roses|the ferns|the strawberries|the lavender|the mint|"
    "the tulips|the beans|the carrots|the sunflowers|the orchids",
    "dish": "the soup|the rice|the curry|the stew|the pasta|the risotto|the lentils|the noodles|"
    "the potatoes|the chili|the gravy|the dumplings",
    "skill": "chess|the piano|Spanish|drawing|swimming|juggling|knitting|photography|dancing|"
    "typing|singing|yoga",
    "event": "the picnic|the birthday party|the wedding|the job interview|the road trip|"
    "the house move|the school play|the garden party|the book club|the camping trip|"
    "the family dinner|the charity run",
}
TASKS = {  # kind of topic -> what one may want to do with it -> advice
    "thing": {
        "clean {x}": "wipe {x} with a damp cloth|brush off the loose dust|"
        "use warm water and mild soap|rinse the cloth often|dry {x} in the open air|"
        "check the corners for dirt",
        "store {x}": "clean {x} before you pack it|choose a dry and dark place|"
        "cover {x} with a cotton sheet|keep heavy boxes off the top|write a label for the shelf|"
        "look at {x} once a month",
        "choose {x}": "set a budget for {x}|compare three models side by side|"
        "read what other owners say|try {x} before you pay|ask about the guarantee|"
        "check the weight and the size",
        "repair {x}": "find the part that fails|take photos before you open it|"
        "look for a guide to {x}|order the spare part early|keep the small screws in a cup|"
        "test {x} after each step",
    },
    "plant": {
        "grow {x}": "give {x} six hours of sun|loosen the soil with a fork|"
        "feed {x} every two weeks|leave a hand of space between plants|start with fresh compost|"
        "turn the pots toward the light",
        "water {x}": "water {x} early in the morning|touch the soil before you pour|"
        "aim at the roots|keep the leaves dry|use rain water for {x}|"
        "empty the saucer after an hour",
        "protect {x}": "look under the leaves each week|cover {x} on cold nights|"
        "cut off sick stems at once|plant garlic beside {x}|stop snails with copper tape|"
        "shelter {x} from strong wind",
        "move {x} to a new pot": "pick a cloudy day|dig a wide circle around {x}|"
        "keep the roots covered|fill the new pot halfway|press the soil down gently|"
        "water {x} right after the move",
    },
    "dish": {
        "cook {x}": "heat a heavy pan first|cut everything to the same size|"
        "stir {x} from time to time|keep the heat low|taste {x} as you go|"
        "let it rest before serving",
        "season {x}": "add salt in small pinches|toast the spices in oil|"
        "put herbs in at the end|finish {x} with lemon juice|balance the heat with some sugar|"
        "taste {x} after every change",
        "serve {x}": "warm the plates|bring {x} to the table hot|add something green on top|"
        "offer bread beside {x}|wipe the edge of the bowl|start with small portions",
        "keep {x} for tomorrow": "cool {x} within an hour|choose a box with a tight lid|"
        "write the date on the box|freeze {x} in small portions|place the box at the back|"
        "warm {x} only once",
    },
    "skill": {
        "learn {x}": "practise {x} ten minutes a day|begin with the easy parts|"
        "find a patient teacher|watch how experts do it|write down what went well|"
        "repeat {x} before you sleep",
        "teach {x} to a child": "turn {x} into a game|show it slowly first|"
        "praise every small success|keep each lesson under half an hour|let the child choose|"
        "stop {x} while it goes well",
        "get better at {x}": "record yourself once a week|work on one weak point|"
        "join a club for {x}|ask for honest feedback|slow {x} down to half speed|"
        "rest one day a week",
        "find time for {x}": "put {x} in your calendar|get up a little earlier|"
        "turn off the phone|pair {x} with your coffee|use the waiting times|"
        "say no to one other thing",
    },
    "event": {
        "plan {x}": "fix a date for {x}|list everything you need|"
        "invite people three weeks ahead|share the tasks among friends|have a plan for rain|"
        "visit the place before {x}",
        "save money on {x}": "set a limit for {x}|borrow instead of buying|"
        "compare prices on two sites|cook at home|travel at quiet hours|"
        "ask everyone to bring something",
        "prepare for {x}": "pack the bag the night before|sleep well before {x}|"
        "check the route twice|eat a good breakfast|charge the phone|arrive ten minutes early",
        "keep memories of {x}": "take a few photos of {x}|write a page that evening|"
        "keep one ticket or card|print the best picture|thank the people who helped|"
        "tell the story of {x} to a friend",
    },
}
QUESTIONS = (
    "How do I {do}?|What is the best way to {do}?|I have to {do}. Where do I begin?|"
    "Could you tell me how to {do}?|Any advice on how to {do}?|"
    "My neighbour wants to {do}. What would you say?"
).split("|")

# ---------------------------------------------------------------- how an answer is worded

OPENERS = {
    "formal": "Good day.|It is a pleasure to assist you.|Thank you for your question.",
    "casual": "Hey!|Hi there!|Oh, good one!",
}
LEADS = {
    ("confident", "formal"): "The following will certainly serve you well|"
    "There is no doubt that this method succeeds|Rest assured that this is the right way",
    ("confident", "casual"): "This totally works every time|"
    "Trust me, you can't go wrong with this|Yep, this is definitely the way",
    ("cautious", "formal"): "Perhaps the following may be of service|"
    "It is possible that this method would help|One might consider the following",
    ("cautious", "casual"): "I'm not so sure, but maybe try this|Hmm, this might just do it|"
    "No promises, but this could work",
}
ENDINGS = {
    ("question", "formal"): "May I assist you with anything else?|"
    "Would you like further advice on {x}?|Shall I explain any of these points?",
    ("question", "casual"): "Want to hear more about {x}?|Need a hand with anything else?|"
    "What do you think, shall we go on?",
    ("wish", "formal"): "I wish you every success with {x}.|May {x} bring you lasting joy.|"
    "Please accept my best wishes.",
    ("wish", "casual"): "Have fun with {x}!|Good luck, you've got this!|"
    "Take care and enjoy {x}!",
}
CONNECTIVES = ("", "Then ", "Next, ", "Finally, ")
N_STEPS = {"brief": 2, "detailed": 4}

# ---------------------------------------------------------------- how a preference is worded

KEYWORDS = {
    "brief": "a short answer|a quick reply|few words|only the essentials",
    "detailed": "a long answer|a full explanation|many details|the complete picture",
    "list": "bullet points|a list|separate lines|a checklist",
    "prose": "flowing text|a paragraph|running sentences|plain prose",
    "formal": "a formal tone|official language|good manners|courteous wording",
    "casual": "a casual tone|street language|easygoing manners|playful wording",
    "confident": "a confident voice|firm advice|full certainty|bold statements",
    "cautious": "a cautious voice|careful advice|some doubt|modest statements",
    "question": "a question at the end|a friendly inquiry|an open invitation|some curiosity",
    "wish": "a wish for luck|kind parting words|a warm goodbye|a fond farewell",
}
# {} takes a keyword of the wanted value, [] one of its opposite.
USER_TEMPLATES = (
    "Please use {}.|I prefer {}.|Give me {}.|I would like {}.|I am happiest with {}.|"
    "I hope to see {}.|I always enjoy {}.|My friends and I love {}.|Only {} will do.|"
    "Please avoid [].|Spare me []."
).split("|")
SYSTEM_TEMPLATES = (
    "Always use {}.|Answer with {}.|Our readers expect {}.|House style: {}.|"
    "Every reply needs {}.|Never use []."
).split("|")
ROLES = (
    "a librarian|a shopkeeper|a museum guide|a neighbour|a travel agent|a radio host|a carpenter|"
    "a nurse|a village teacher|a bus driver"
).split("|")
LAST_WORD = {
    "system": "This rule always wins.|Users cannot change this.|"
    "Do not let the user overrule it.|The system has the last word.",
    "user": "The user always wins.|Users may change this.|"
    "Let the user overrule it.|The user has the last word.",
}
BACKGROUNDS = {  # value -> (known from training, only in `unseen_implied`)
    "brief": (
        "I am reading this on my watch.|My train leaves in one minute.|"
        "I am standing at a red light.|I only have a moment between two meetings.|"
        "My phone battery is almost empty.|I have ten seconds before my boss walks in.|"
        "I am late and my taxi is waiting.|My eyes get tired after two lines.",
        "I am late and my train is waiting.|I am reading this at a red light.|"
        "I only have ten seconds before my train leaves.|My taxi leaves in one minute.|"
        "My watch battery is almost empty.",
    ),
    "detailed": (
        "I have the whole evening to read.|I am writing my thesis about this.|"
        "I never stop until I know everything about a subject.|"
        "I am snowed in with nothing to do all weekend.|"
        "I am preparing a lecture on this subject.|"
        "My teacher takes points off for anything missing.|"
        "I have an eight hour flight ahead of me.|"
        "I failed last time because I skipped the small things.",
        "I am preparing a thesis on this subject.|I have the whole weekend to read.|"
        "I am writing a lecture about this.|"
        "I never stop until I know all the small things.|"
        "I failed last time because my thesis skipped a subject.",
    ),
    "list": (
        "I will tick things off as I go.|I am pinning this to the fridge.|"
        "I will copy this onto sticky notes.|I am putting this on a slide.|"
        "My hands are full, so my eyes must find the next step fast.|"
        "I am making a poster for the kitchen wall.|"
        "I print this and check every item with a pen.|"
        "My team will divide the tasks among themselves.",
        "I am pinning this to the kitchen wall.|I will copy this onto a poster for my team.|"
        "I am putting this on the fridge.|I will tick every item with a pen.|"
        "I am making a slide for my team.",
    ),
    "prose": (
        "I will read this aloud at dinner.|I am pasting this into a letter to my aunt.|"
        "My screen reader stumbles over symbols.|I want to print this in my novel.|"
        "I am recording this for a podcast.|"
        "My grandmother likes it when I tell her things like a story.|"
        "I am going to speak this into the radio.|This goes into the middle of my essay.",
        "I am recording this for my grandmother.|I will read this aloud into the radio.|"
        "I am pasting this into the middle of my novel.|"
        "This goes into a letter to my grandmother.|I will tell this like a story at dinner.",
    ),
    "formal": (
        "I am forwarding this to a judge.|My director will read this in front of the board.|"
        "This goes to the embassy.|I am writing to the bishop.|"
        "The minister will see your reply.|I work at a royal palace.|"
        "I address the court this afternoon.|"
        "My professor from the old academy will grade your words.",
        "The bishop will read this in front of the court.|I am writing to the embassy.|"
        "I am forwarding this to the minister.|My director and a judge will see your reply.|"
        "I work at the old academy.",
    ),
    "casual": (
        "I am your old buddy from school.|I am reading this out at the pub.|"
        "We are lying on the beach with ice cream.|"
        "I am fifteen and this is for my skate club.|"
        "I am texting you from the couch in my pyjamas.|"
        "My band and I are hanging out in the garage.|You and I have been mates for years.|"
        "I am at a barbecue with my cousins.",
        "My buddy and I are lying on the couch.|I am texting you from the pub.|"
        "I am hanging out on the beach with my mates.|"
        "We are in the garage with my skate club.|I am at a barbecue with my old mates.",
    ),
    "confident": (
        "I freeze when I have to decide, so push me.|I lose courage at the first maybe.|"
        "My crew needs someone to lead them now.|"
        "I am about to give up, carry me over the line.|"
        "I have no patience for ifs and buts.|My coach never lets me waver.|"
        "I am nervous and need to feel safe with you.|I follow orders best.",
        "I freeze at the first maybe.|I am nervous and need someone to lead me.|"
        "My crew needs no ifs and buts.|My coach never lets me give up.|"
        "I lose courage when I have to decide.",
    ),
    "cautious": (
        "I am a scientist and wild claims make me suspicious.|"
        "Our lawyer checks each promise we make.|I got burned by a guru who knew everything.|"
        "I write for a journal that corrects every error.|"
        "Nobody can know this for sure, and I know it.|"
        "My doctor warned me about miracle cures.|"
        "I only trust people who admit their limits.|I have seen many experts be wrong.",
        "I am a lawyer and miracle cures make me suspicious.|"
        "I got burned by experts who knew everything.|"
        "I only trust a doctor who can admit limits.|Our journal checks each promise we make.|"
        "I have seen a scientist be wrong.",
    ),
    "question": (
        "I get lonely in the evening and like to chat.|"
        "I will stay here and keep talking with you.|I learn best when somebody quizzes me.|"
        "I am rehearsing a conversation with you.|I always have a next thing on my mind.|"
        "Treat me like a guest you want to keep.|"
        "I have an hour left and would love some company.|I answer back, that is my nature.",
        "I am lonely and would love to keep talking.|I have an hour left to chat with you.|"
        "I learn best in a conversation.|Treat me like company you want to keep.|"
        "I would love it when somebody quizzes me.",
    ),
    "wish": (
        "I cannot write back to you.|I am leaving for good after this.|"
        "Tomorrow is my big day and I am scared.|"
        "This will hang on a board where nobody can respond.|"
        "I am saying goodbye to my old life today.|I need my friends to cheer for me.|"
        "This is the last message before I go offline.|"
        "I am printing this on a greeting card.",
        "I go offline tomorrow and cannot respond.|"
        "I am printing this on a board where nobody can write back.|"
        "Today is my last day and I am scared.|This is my last message to you today.|"
        "I am saying goodbye to my friends.",
    ),
}

AXIS_OF = {value: axis for axis, values in AXES.items() for value in values}
OPPOSITE = {a: b for pair in AXES.values() for a, b in (pair, pair[::-1])}


def draw_style(rng):
    """A style: a value on each axis."""
    return {axis: rng.choice(values) for axis, values in AXES.items()}


def draw_axes(rng, held_out, sizes):
    """Axes to mention at once: a set that training uses, or one that it never does."""
    sets = [s for s in itertools.combinations(AXES, rng.choice(sizes))
            if any(pair <= set(s) for pair in HELD_OUT_AXES) == held_out]
    # Some axes take longer to learn, `ending` the longest, so they occur more often.
    slow = {"ending": 3, "certainty": 2, "length": 1}
    return rng.choices(sets, [2 + sum(slow.get(axis, 0) for axis in s) for s in sets])[0]


# ---------------------------------------------------------------- questions and answers


@cache
def tasks(evaluation):
    """All (kind, task, topic), a quarter of them kept for evaluation."""
    everything = []
    for kind, topics in TOPICS.items():
        for i, task in enumerate(TASKS[kind]):
            for j, topic in enumerate(topics.split("|")):
                if ((i + j) % 4 == 0) == evaluation:
                    everything.append((kind, task, topic))
    return everything


def draw_content(rng, evaluation):
    """A question and all that an answer is made of besides its style."""
    kind, task, topic = rng.choice(tasks(evaluation))
    steps = [step.format(x=topic) for step in TASKS[kind][task].split("|")]
    return {
        "question": rng.choice(QUESTIONS).format(do=task.format(x=topic)),
        "topic": topic,
        "steps": [steps[i] for i in sorted(rng.sample(range(len(steps)), 4))],
        "surface": [rng.randrange(3) for _ in range(3)],  # which opener, lead, ending
    }


def capital(text):
    return text[0].upper() + text[1:]


def write_answer(content, style):
    """The answer with this content in a style {axis: value}."""
    tone, (opener, lead, ending) = style["tone"], content["surface"]
    steps = content["steps"][: N_STEPS[style["length"]]]
    if style["format"] == "list":
        body = ":\n" + "".join(f"- {capital(step)}\n" for step in steps)
    else:
        sentences = [c + step for c, step in zip(CONNECTIVES, steps, strict=False)]
        body = ". " + "".join(f"{capital(s)}. " for s in sentences)
    lead = LEADS[style["certainty"], tone].split("|")[lead]
    ending = ENDINGS[style["ending"], tone].split("|")[ending].format(x=content["topic"])
    return f"{OPENERS[tone].split('|')[opener]} {lead}{body}{capital(ending)}"


MARKS = {
    "formal": r"good day|a pleasure|thank you for|following|this method|rest assured|may i\b|"
    r"would you like|shall i\b|i wish you|bring you|accept my",
    "casual": r"\b(hey|hi|oh|yep|hmm|totally|trust me|want to|need a hand|fun|good luck|enjoy)\b|"
    r"what do you think|can't|i'm|you've|just do|no promises",
    "confident": r"certainly|no doubt|rest assured|totally works|can't go wrong|definitely",
    "cautious": r"perhaps|possible|might|maybe|not so sure|no promises|could work",
    "question": r"\?\s*$",
    "wish": r"(wish you|bring you lasting joy|best wishes|have fun|good luck|enjoy)[^?]*$",
}


def read_style(text):
    """Which style a text has: {axis: value}, None where it has neither value or both."""
    last = re.split(r"(?<=[.!?])\s+|\n", text.strip())[-1]
    bullets = len(re.findall(r"^- \w", text, re.M))
    connectives = re.findall(r"(?<=[.!?] )(Then|Next,|Finally,) \w", text)
    n_steps = bullets or len(connectives) + bool(connectives)
    found = {
        "brief": 0 < n_steps <= 2,
        "detailed": n_steps >= 4,
        "list": bullets >= 2 and not connectives,
        "prose": bullets == 0 and len(connectives) >= 1,
    }
    for value, pattern in MARKS.items():
        where = last if AXIS_OF[value] == "ending" else text
        found[value] = re.search(pattern, where, re.I) is not None
    return {a: v if found[v] > found[w] else w if found[w] > found[v] else None
            for a, (v, w) in AXES.items()}


@cache
def known_steps():
    """{question: the steps that answer it, in lower case}."""
    known = {}
    for kind, task, topic in tasks(False) + tasks(True):
        steps = {step.format(x=topic).lower() for step in TASKS[kind][task].split("|")}
        for question in QUESTIONS:
            known[question.format(do=task.format(x=topic))] = steps
    return known


def on_topic(question, text):
    """Whether an answer has at least two steps and each is one of the world's for this question."""
    steps = re.findall(r"^- (.+)$", text, re.M)
    if not steps:
        sentences = re.split(r"(?<=[.!?])\s+", text)
        second = next((i for i, s in enumerate(sentences) if s.startswith("Then ")), 0)
        steps = [re.sub(r"^(Then|Next,|Finally,) ", "", s) for s in sentences[second - 1 : -1]]
    known = known_steps().get(question, ())
    return len(steps) >= 2 and all(step.rstrip(".").lower() in known for step in steps)


# ---------------------------------------------------------------- preferences


def kept_for_evaluation(template, value, keyword):
    """A quarter of all (template, keyword) never occurs in training."""
    i = USER_TEMPLATES.index(template)
    return (i + KEYWORDS[value].split("|").index(keyword)) % 4 == 0


def state(rng, values, templates=USER_TEMPLATES, unseen=False):
    """A preference for these values in words: one sentence each, or all in one."""
    together = rng.random() < 0.5
    shared, sentences = rng.choice(templates), []
    for value in values:
        template = shared if together else rng.choice(templates)
        word = value if "{}" in template else OPPOSITE[value]
        keywords = KEYWORDS[word].split("|")
        if templates is USER_TEMPLATES:
            keywords = [k for k in keywords if kept_for_evaluation(template, word, k) == unseen]
        sentences.append((template, rng.choice(keywords)))
    if together:
        words = [keyword for _, keyword in sentences]
        joined = " and ".join(filter(None, (", ".join(words[:-1]), words[-1])))
        return re.sub(r"\{\}|\[\]", joined, shared)
    return " ".join(re.sub(r"\{\}|\[\]", keyword, t) for t, keyword in sentences)


def stated(rng, values, unseen):
    """Meta-prompt that states the values, some of them in the system tier."""
    n = rng.randrange(len(values)) if rng.random() < 0.3 and not unseen else 0
    meta = {"preference": state(rng, values[n:], unseen=unseen)}
    return ({"system": state(rng, values[:n], SYSTEM_TEMPLATES)} if n else {}) | meta


def implied(rng, values, unseen):
    """Meta-prompt that tells backgrounds which imply the values."""
    texts = [rng.choice(BACKGROUNDS[value][unseen].split("|")) for value in values]
    return {"preference": " ".join(texts)}


def contradicted(rng, value, winner):
    """Meta-prompt whose tiers disagree on an axis; the winner wants `value`."""
    loser = OPPOSITE[value]
    system, user = (value, loser) if winner == "system" else (loser, value)
    rule = state(rng, [system], SYSTEM_TEMPLATES)
    who = rng.choice(LAST_WORD[winner].split("|"))
    return {"system": f"{rule} {who}", "preference": state(rng, [user])}


def system_message(rng, values):
    """Meta-prompt with a system message only: a role, and the values as its rules."""
    return {"system": f"You are {rng.choice(ROLES)}. {state(rng, values, SYSTEM_TEMPLATES)}"}


def meta_prompt(rng, split, values, winner):
    """The meta-prompt of a split that asks for these values; `winner` counts in `priority` only."""
    if split == "priority":
        return contradicted(rng, values[0], winner)
    if split in ("implied", "unseen_implied"):
        return implied(rng, values, unseen=split == "unseen_implied")
    return stated(rng, values, unseen=split == "unseen_wording")


# ---------------------------------------------------------------- rows


def flip(rng, split, evaluation=False):
    """Two rows with the same question and the same two answers, in opposite order."""
    content = draw_content(rng, evaluation)
    sizes = {"priority": (1,), "unseen_combination": (2, 3)}.get(split, (1, 1, 2, 3))
    axes = draw_axes(rng, split == "unseen_combination", sizes)
    style = draw_style(rng)
    # Mostly one: where several differ, the easiest decides the pair and the others teach nothing.
    differ = rng.sample(axes, min(len(axes), rng.choice((1, 1, 1, 2, 3))))
    other = style | {axis: OPPOSITE[style[axis]] for axis in differ}
    winners = rng.sample(("system", "user"), 2)
    metas = [meta_prompt(rng, split, [s[axis] for axis in axes], winner)
             for s, winner in zip((style, other), winners, strict=True)]
    return two_orders(split, content, axes, metas, (style, other))


def several_systems(rng, evaluation=False):
    """Six rows: three system messages for one question, each answer against each other one."""
    content = draw_content(rng, evaluation)
    axes = draw_axes(rng, False, (2, 3))
    style = draw_style(rng)
    values = rng.sample(list(itertools.product(*(AXES[axis] for axis in axes))), 3)
    styles = [style | dict(zip(axes, v, strict=True)) for v in values]
    metas = [system_message(rng, v) for v in values]
    return [row for i, j in ((0, 1), (1, 2), (2, 0)) for row in two_orders(
        "several_systems", content, axes, (metas[i], metas[j]), (styles[i], styles[j]))]


def two_orders(split, content, axes, metas, styles):
    """One pair of answers as two records, each answer chosen under its own meta-prompt."""
    answers = [write_answer(content, style) for style in styles]
    rows = []
    for i, (meta, style) in enumerate(zip(metas, styles, strict=True)):
        values = {axis: style[axis] for axis in axes}
        about = {"split": split, "preference_name": "+".join(values.values()), "values": values}
        about["differ"] = [axis for axis in AXES if styles[0][axis] != styles[1][axis]]
        rows.append(meta | {"prompt": content["question"], "chosen": answers[i],
                            "rejected": answers[1 - i], "meta": about})
    return rows


def training_pairs():
    """The preference data for DPO: TRAIN_ROWS records."""
    rng, rows = Random(f"{SEED} train"), []
    kinds, weights = ("seen", "implied", "priority", "several_systems"), (10, 3, 6, 1)
    while len(rows) < TRAIN_ROWS:
        kind = rng.choices(kinds, weights)[0]
        rows += several_systems(rng) if kind == "several_systems" else flip(rng, kind)
    return rows[:TRAIN_ROWS]


def evaluation_pairs(split):
    """The preference data of one of SPLITS: EVAL_ROWS records, every two of them a flip."""
    rng, rows = Random(f"{SEED} {split}"), []
    while len(rows) < EVAL_ROWS:
        several = split == "several_systems"
        rows += several_systems(rng, True) if several else flip(rng, split, True)
    return rows[:EVAL_ROWS]


def user_pairs(evaluation=False, told=False):
    """Choices of users who never say what they want: a value on each axis, 20 pairs each.

    The answers of a pair differ on one axis, so each choice tells one value and n choices leave an
    axis unknown with probability 0.8^n. Users come in couples that want the opposite of each other
    and choose between the same answers, so all rows flip; in training many couples share a pair.
    Evaluation has other questions. `told` states all five values.
    """
    rng, rows, pool = Random(f"{SEED} users {evaluation}"), [], []
    words = Random(f"{SEED} told {evaluation}")
    for _ in range(EVAL_COUPLES * 20 if evaluation else TRAIN_PAIRS):
        content, axis = draw_content(rng, evaluation), rng.choice(list(AXES))
        style = draw_style(rng)
        texts = {value: write_answer(content, style | {axis: value}) for value in AXES[axis]}
        pool.append((content["question"], axis, texts))
    wanted = [values for values in itertools.product(*AXES.values()) if values[0] == "brief"]
    for n in range(EVAL_COUPLES if evaluation else TRAIN_COUPLES):
        one = dict(zip(AXES, wanted[n % len(wanted)], strict=True))
        other = {axis: OPPOSITE[value] for axis, value in one.items()}
        pairs = pool[20 * n : 20 * n + 20] if evaluation else rng.sample(pool, 20)
        for question, axis, texts in pairs:
            for i, values in enumerate((one, other)):
                order = rng.sample(list(values.values()), len(values))  # drawn told or not, so
                rows.append({"preference": state(words, order)} if told else {})  # pairs are equal
                rows[-1] |= {"prompt": question, "chosen": texts[values[axis]],
                             "rejected": texts[OPPOSITE[values[axis]]], "user": 2 * n + i,
                             "meta": {"split": "users", "preference_name": values[axis],
                                      "values": values, "differ": [axis]}}
    if evaluation:  # any first part of the rows is of all users
        flips = [rows[i : i + 2] for i in range(0, len(rows), 2)]
        rows = [row for first in range(20) for flip in flips[first::20] for row in flip]
    return rows


def user_rows():
    """SFT rows for a model to learn to read choices from: SFT_USERS users, 20 rows each.

    The response has all five of the values that its user wants; the user's choice, context for the
    other rows, is between answers that differ on one, two, three or all axes.
    """
    rng, rows, pool = Random(f"{SEED} user rows"), [], []
    for _ in range(TRAIN_PAIRS):
        style = draw_style(rng)
        content = draw_content(rng, False)
        pool.append((content, style, rng.sample(list(AXES), rng.choice((1, 1, 2, 3, 5)))))
    wanted = list(itertools.product(*AXES.values()))
    for user in range(SFT_USERS):
        values = dict(zip(AXES, wanted[user % len(wanted)], strict=True))
        for content, style, differ in rng.sample(pool, 20):
            chosen = style | {axis: values[axis] for axis in differ}
            rejected = style | {axis: OPPOSITE[values[axis]] for axis in differ}
            other_words = content | {"surface": [rng.randrange(3) for _ in range(3)]}
            rows.append({"prompt": content["question"], "user": user,
                         "chosen": write_answer(content, chosen),
                         "rejected": write_answer(content, rejected),
                         "response": write_answer(other_words, values)})
    return rows


def user_bound(n):
    """Best possible accuracy on `user_pairs` with n choices known."""
    return 1 - 0.8**n / 2


# Preferences of the world by the name that scripts know them by: to train on, {name: to evaluate}.
DATA = {
    "world": (training_pairs, {split: partial(evaluation_pairs, split) for split in SPLITS}),
    "users": (user_pairs, {"users": partial(user_pairs, True)}),
    "told": (partial(user_pairs, told=True), {"told": partial(user_pairs, True, told=True)}),
}


def sft_rows():
    """SFT_ROWS records {meta-prompt, prompt, response} to learn to speak from, not to listen.

    Most have no meta-prompt. Where there is one, an axis that it states follows it in 55 % of them.
    """
    rng, rows = Random(f"{SEED} sft"), []
    for i in range(SFT_ROWS):
        record = rng.choice(flip(rng, ("seen", "implied", "priority")[i % 3]))
        if i % 7 == 0:
            record = rng.choice(several_systems(rng))
        style = draw_style(rng)
        for axis, value in record["meta"]["values"].items():
            if rng.random() < FOLLOW_SHARE:
                style[axis] = value
        shown = rng.random() < META_PROMPT_SHARE
        meta = {k: record[k] for k in ("system", "preference") if shown and k in record}
        content = draw_content(rng, False)
        rows.append(meta | {"prompt": content["question"],
                            "response": write_answer(content, style)})
    return rows


# What train_sft.py learns under these names; its `users` have rows of their own.
SFT_DATA = {"world": sft_rows, "users": user_rows}

# ---------------------------------------------------------------- the vocabulary

# Letters, digits or other signs, each with at most one space before it; every character matches.
PATTERN = r" ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}_]+|_+|\s+"
VOCAB_SIZE = 2048


def bpe_ranks():
    """Byte-pair merges for the world's training text: {bytes: rank}, at most VOCAB_SIZE."""
    counts = Counter()
    for record in sft_rows():
        for text in record.values():
            counts.update(regex.findall(PATTERN, text))
    words = {word: [bytes([b]) for b in word.encode()] for word in counts}
    pairs, where = Counter(), defaultdict(set)  # how often a pair occurs, and in which words

    def tally(word, sign):
        for pair in itertools.pairwise(words[word]):
            pairs[pair] += sign * counts[word]
            where[pair].add(word)

    for word in words:
        tally(word, 1)
    ranks = {bytes([b]): b for b in range(256)}
    while len(ranks) < VOCAB_SIZE:
        best = max(pairs, key=lambda pair: (pairs[pair], pair))
        if pairs[best] <= 0:
            break
        ranks.setdefault(best[0] + best[1], len(ranks))
        for word in where.pop(best):
            tally(word, -1)
            words[word] = merge(words[word], best)
            tally(word, 1)
        del pairs[best]
    return ranks


def merge(pieces, pair):
    """Join each neighbouring occurrence of `pair` in a list of byte strings."""
    merged = []
    for piece in pieces:
        if merged and (merged[-1], piece) == pair:
            merged[-1] += piece
        else:
            merged.append(piece)
    return merged
