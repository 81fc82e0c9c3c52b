"""Few-shot steering: the preference is not stated but inferred from a few of the user's choices.

Two mechanisms read a record's `examples`: as text in the meta-prompt, or as a latent z that an
encoder makes of them and that steers every block of the model through FiLM (NP-DPO), or every layer
of a reward model (NP-BTL). Both are neural processes: Kobalczyk et al. 2024, arXiv:2412.13998.
"""

import random
from collections import defaultdict
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils.rnn import pad_sequence

import data
from common import UserError
from model import Encoder, FiLM, pack

# ---------------------------------------------------------------- whose choices are the context

# Where a row comes from that does not know its file and line.
BUILT_IN = "built-in data (--context needs `users`)"


def choice(record):
    """A record as one of its user's earlier choices, an entry of `examples`.

    Of several turns it has the last one; the meta-prompt and label_prob are not part of it.
    Raises UserError for a record that is not a pair of answers.
    """
    if "chosen" not in record:
        raise UserError(f"{record.get('where', BUILT_IN)}: field 'chosen': missing; a user's "
                        "earlier choices are pairs of answers")
    prompt = data.prompt_turns(record)[-1]["content"]
    return {"prompt": prompt, "chosen": record["chosen"], "rejected": record["rejected"]}


def user_of(record):
    """Whose choice it is, as text: 5 is "5" in another file."""
    if "user" not in record:
        raise UserError(f"{record.get('where', BUILT_IN)}: field 'user': missing; the context "
                        "of a choice is what else its user chose")
    return str(record["user"])


def is_certain(record):
    return record.get("label_prob", 1.0) == 1


def pair_of(found):
    """What a choice was between: the prompt and both answers, whichever was chosen."""
    return found["prompt"], *sorted((found["chosen"], found["rejected"]))


class Contexts:
    """For each record the choices that its user made elsewhere.

    To the same prompt with one of the same answers is not elsewhere: who prefers A to B tells
    something of A against C. A choice of uncertain label is shown to nobody.
    """

    def __init__(self, records, source=None):
        """`source` are the records to take choices from; default: the records themselves.

        A pair on which a user chose several times counts once. Raises UserError for a record that
        names no user or is not a pair.
        """
        given = sum("examples" in record for record in records)
        if given:
            print(f"{given} of {len(records)} rows: their own examples give way to choices of "
                  "their users")
        self.source = records if source is None else source
        self.of_user = defaultdict(dict)  # {user: {pair: the first choice on it}}
        for record in filter(is_certain, self.source):
            found = choice(record)
            self.of_user[user_of(record)].setdefault(pair_of(found), found)
        self.rows = [(user_of(record), pair_of(choice(record))) for record in records]

    def elsewhere(self, row):
        """The choices that may be shown to a row."""
        user, (prompt, *answers) = self.rows[row]
        return [found for pair, found in self.of_user.get(user, {}).items()
                if pair[0] != prompt or set(answers).isdisjoint(pair[1:])]

    def sizes(self):
        """How many choices there are to be shown to each record."""
        return [len(self.elsewhere(row)) for row in range(len(self.rows))]

    def require(self, records):
        """Raises UserError when there is nothing to show to any of the records.

        Says so when what is shown was chosen under a meta-prompt that is not.
        """
        say_stated(self.source)
        if not any(self.sizes()):
            raise UserError(f"{records[0].get('where', 'the records')}: --context: neither this "
                            "row's user nor any other's has a choice elsewhere to be shown, that "
                            "is one without a label_prob below 1")

    def draw(self, row, n, rng):
        """n of the choices of the user of a row, or all where there are fewer.

        With equal random states fewer are the beginning of more.
        """
        pool = self.elsewhere(row)
        rng.shuffle(pool)
        return pool[:n]


def say_stated(records):
    """Say how many choices were made under a meta-prompt, which a context does not show."""
    stated = sum(is_certain(x) and any(map(x.get, data.TEXT_TIERS)) for x in records)
    if stated:
        print(f"{stated} choices were made under a system message or preference, which "
              "their context does not show")


def with_context(records, n, source=None):
    """The records with n choices of their users as `examples`, the same in every call."""
    contexts = Contexts(records, source)
    if n:
        contexts.require(records)
    few = sum(size < n for size in contexts.sizes())
    if few:
        print(f"{few} of {len(records)} rows have fewer than {n} choices in their context")
    return [record | {"examples": contexts.draw(i, n, random.Random(i))}
            for i, record in enumerate(records)]


def with_random_contexts(records, rows, most, seed):
    """The records at `rows`, each time with 0 to `most` other choices of its user as `examples`.

    Examples that a record brings give way to them.
    """
    contexts, rng = Contexts(records), random.Random(seed)
    contexts.require(records)
    alone = contexts.sizes().count(0)
    if alone:
        print(f"{alone} of {len(records)} rows have no other choice of their user to be shown")
    return [records[i] | {"examples": contexts.draw(i, rng.randint(0, most), rng)} for i in rows]


def without_examples(records):
    """Records as the text that a model with a latent reads: it sees the choices as numbers."""
    return [{k: v for k, v in record.items() if k != "examples"} for record in records]


# ---------------------------------------------------------------- choices as numbers


@torch.no_grad()
def answer_features(model, trees):
    """Of each answer the mean and the last of the model's outputs on it: (n_answers, 2 C) float32.

    They are outputs of the predictors, from the trunk's last token to the answer's.
    """
    outputs = model(trees).index_select(0, trees.predictors).float()  # (A, C)
    count = trees.answer.bincount(minlength=trees.n_answers)
    mean = outputs.new_zeros(trees.n_answers, outputs.shape[1]).index_add(0, trees.answer, outputs)
    last = outputs.index_select(0, count.cumsum(0) - 1)
    return torch.cat((mean / count[:, None], last), dim=1)


class Features:
    """Answers as the frozen starting model sees them, each computed once and kept."""

    def __init__(self, model, tokenizer, micro_tokens=4096):
        self.model, self.tokenizer, self.micro_tokens = model, tokenizer, micro_tokens
        device = model.embedding.weight.device
        self.places = {}  # {(prompt, answer): row of the table}
        self.table = torch.empty(0, 2 * model.config.n_embd, device=device)

    def __call__(self, choices):
        """(len(choices), 2, F): of the answer chosen and of the one passed over."""
        keys = self.read(choices)
        return self.table[[self.places[key] for key in keys]].unflatten(0, (-1, 2))

    def read(self, choices):
        """Put new answers into the table: the keys of all, two for each choice."""
        keys = [(found["prompt"], found[side])
                for found in choices for side in ("chosen", "rejected")]
        new = list(dict.fromkeys(key for key in keys if key not in self.places))
        if new:
            self.add(new)
        return keys

    def add(self, keys):
        records = [{"prompt": prompt, "response": answer, "where": "a choice"}
                   for prompt, answer in keys]
        examples = data.encode_all(records, self.tokenizer, self.model.config.block_size, "choices")
        found = self.table.new_empty(len(keys), self.table.shape[1])
        for rows in data.micro_batches(examples, self.micro_tokens):
            trees = pack([examples[i].tree for i in rows], self.table.device)
            found[rows] = answer_features(self.model, trees)
        self.places |= {key: len(self.places) + i for i, key in enumerate(keys)}
        self.table = torch.cat((self.table, found))


def context_tensors(features, contexts):
    """pairs (B, N, 2, F) and present (B, N) of B lists of at most N choices, as `Encoder` likes."""
    found = features([choice for context in contexts for choice in context])
    pairs = found.split(list(map(len, contexts)))
    present = [found.new_ones(len(context)) for context in contexts]
    return pad_sequence(pairs, batch_first=True), pad_sequence(present, batch_first=True)


def latents(model, records, features=None, at_once=2**14):
    """z of records, from their `examples`: (B, n_latent).

    features: how the encoder sees choices, such as a `Features`; default: the model's own.
    at_once: how many choices are read together, which bounds memory.
    """
    features = features or model.features
    contexts = [record.get("examples", []) for record in records]
    size = max(1, at_once // max(1, *map(len, contexts)))
    parts = (contexts[i : i + size] for i in range(0, len(contexts), size))
    return torch.cat([model.encoder(*context_tensors(features, part))[0] for part in parts])


def rewards(model, records, z):
    """What users with latents z (B, Z) think of the two answers of their records: (B, 2) float32.

    Linear in an answer's features and in z, so that z = 0 has no preference. Only training asks.
    """
    features = model.encoder.normalize(model.features(list(map(choice, records))))  # (B, 2, F)
    return (model.reward_head(features).float() * z[:, None]).sum(-1)


# ---------------------------------------------------------------- NP-BTL


class RewardModel(nn.Module):
    """An answer's reward to a user: a multilayer perceptron of its features, FiLM in each layer.

    Two answers compare as in Bradley and Terry's model: p(a is chosen) = sigmoid(r(a) - r(b)).
    """

    def __init__(self, n_features, n_latent, n_hidden, n_layer):
        super().__init__()
        sizes = [n_features, *[n_hidden] * n_layer]
        self.encoder = Encoder(n_features, n_latent, n_hidden)
        self.layers = nn.ModuleList(nn.Linear(a, b) for a, b in pairwise(sizes))
        self.films = nn.ModuleList(FiLM(n_latent, n_hidden) for _ in range(n_layer))
        self.out = nn.Linear(n_hidden, 1)

    def forward(self, features, z):
        """Rewards (B, ...) of answers with features (B, ..., F), each row under its z (B, Z)."""
        shape = features.shape[:-1]
        x = self.encoder.normalize(features).flatten(0, -2)
        rows = torch.arange(len(z), device=z.device).repeat_interleave(len(x) // len(z))
        for layer, film in zip(self.layers, self.films, strict=True):
            x = F.silu(film(layer(x), z, rows))
        return self.out(x).view(shape)
