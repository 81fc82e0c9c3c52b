"""The transformer: RMSNorm, RoPE, SwiGLU, grouped-query attention, over batches of token trees.

A *tree* is a trunk (the prompt) followed by its branches (the answers). A batch is one flat run of
tokens: no prefix runs twice and no position is padded. Attention alone looks at the tokens as
*spans*: runs of queries, each of which sees its span's keys up to itself.
"""

import functools
import math
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

# Under a mask cuDNN's attention can give NaN gradients (pytorch/pytorch issue 196678), and it plans
# anew for every shape; flash and memory-efficient attention remain.
torch.backends.cuda.enable_cudnn_sdp(False)


@dataclass(frozen=True)
class ModelConfig:
    vocab_size: int
    block_size: int  # longest path, trunk and one branch, in tokens
    n_layer: int
    n_head: int
    n_kv_head: int  # each key/value head serves n_head / n_kv_head query heads
    n_embd: int
    n_hidden: int  # width inside the SwiGLU
    rope_theta: float = 10000.0
    rope_scaling: dict | None = None  # Llama 3's: factor, low_freq_factor, high_freq_factor, ...
    norm_eps: float = 1e-5
    qk_norm: bool = True  # RMSNorm on each query and key head, as in Qwen3
    qkv_bias: bool = False  # as in Qwen2
    head_size: int = 0  # channels of a head; 0: n_embd / n_head
    tied: bool = True  # the embedding is the output head too
    n_latent: int = 0  # channels of the latent that steers every block; 0: there is none

    def __post_init__(self):
        if not self.head_size:
            object.__setattr__(self, "head_size", self.n_embd // self.n_head)


# ---------------------------------------------------------------- token trees


@dataclass
class Group:
    """S spans of like sizes, padded at their ends to Lq queries and Lk keys."""

    queries: torch.Tensor  # (S, Lq) tokens of the batch; padding repeats some token
    keys: torch.Tensor  # (S, Lk)
    mask: torch.Tensor | None  # (S, 1, Lq, Lk) bool, True where a query may look; None: causal


@dataclass
class Trees:
    """A batch of token trees: T tokens that are run, A that are learned.

    A branch's last token is learned, not run.

    Each branch is a span: its trunk's tokens, then its own. In a tree's first span, and where the
    trunk is shorter than the branch, the trunk's tokens are queries too and attention is causal;
    else they are keys only, under a mask.
    """

    tokens: torch.Tensor  # (T,) every tree's trunk, then its branches
    tree: torch.Tensor  # (T,) which tree a token is of
    positions: torch.Tensor  # (T,) distance from the root; a branch goes on from its trunk
    groups: list  # of Group: all spans
    places: torch.Tensor  # (T,) a token's place in the outputs of all groups, one after the other
    predictors: torch.Tensor  # (A,) the token whose output predicts the learned token
    targets: torch.Tensor  # (A,) the learned token
    answer: torch.Tensor  # (A,) which answer, counted over the whole batch, it belongs to
    n_answers: int
    paths: torch.Tensor | None = None  # (B, longest) the tokens of each sequence to be cached
    z: torch.Tensor | None = None  # (trees, n_latent) what steers the tree; None: nothing does

    def attend(self, q, k, v, cache=None):
        """Attention of q (T, H, D) over k, v (T, KV, D): (T, H * D).

        A layer's cache (2, B, KV, size, D) is filled with the keys and values of the paths.
        """
        if cache is not None:
            cache[0, :, :, : self.paths.shape[1]] = take(k, self.paths)
            cache[1, :, :, : self.paths.shape[1]] = take(v, self.paths)
        outputs = [
            attention(take(q, group.queries), take(k, group.keys), take(v, group.keys), group.mask)
            .transpose(1, 2).flatten(2).flatten(0, 1)
            for group in self.groups
        ]
        return torch.cat(outputs).index_select(0, self.places)


def take(x, rows):
    """x (T, H, D) at rows (S, L): (S, H, L, D)."""
    return x.index_select(0, rows.flatten()).unflatten(0, rows.shape).transpose(1, 2)


def attention(q, k, v, mask):
    """Of q (S, H, Lq, D) over k, v (S, KV, Lk, D) where the mask is True; without one, causal."""
    on_cpu, share = q.device.type == "cpu", q.shape[1] // k.shape[1]
    if on_cpu and q.dtype == torch.bfloat16:
        return BlockAttention.apply(q, k, v, mask)
    if not on_cpu and share > 1:  # not all kernels of a GPU share a key/value head
        k, v = k.repeat_interleave(share, dim=1), v.repeat_interleave(share, dim=1)
    how = {"attn_mask": mask, "is_causal": mask is None, "enable_gqa": on_cpu and share > 1}
    with torch.autocast(q.device.type, enabled=False):
        return F.scaled_dot_product_attention(q, k, v, **how)


CACHE = 2**20  # numbers that stay in a CPU's cache


def slices(x, size=None):
    """Slices of x of `size` rows; by default as many of a matrix as stay in a CPU's cache."""
    size = size or (CACHE // x.shape[1] + 1 if x.device.type == "cpu" else len(x))
    return (slice(i, min(i + size, len(x))) for i in range(0, len(x), size))


class BlockAttention(torch.autograd.Function):
    """`attention` in bfloat16 on a CPU, where torch's own kernel is no faster than in float32.

    Scores exist for a block of queries at a time, in the forward pass and, made again, in the
    backward pass (as in FlashAttention, Dao et al. 2022, arXiv:2205.14135). They are rounded to
    bfloat16, their softmax is float32.
    """

    SIZE = 64  # queries of a block

    @staticmethod
    def forward(ctx, q, k, v, mask):
        ctx.shape, n_kv_head = k.shape[:2], k.shape[1]
        q = q * q.shape[-1] ** -0.5
        q = q.unflatten(1, (n_kv_head, -1)).flatten(0, 1)  # (N, H / KV, Lq, D), N = S * KV
        k, v = k.flatten(0, 1), v.flatten(0, 1)  # (N, Lk, D)
        mask = None if mask is None else mask.repeat_interleave(n_kv_head, dim=0)
        y = torch.empty_like(q)
        for some, rows, keys in BlockAttention.blocks(q, k, mask):
            probs = BlockAttention.probs(q, k, mask, some, rows, keys)
            y[some, :, rows] = (probs.type_as(v) @ v[some, keys]).unflatten(1, (q.shape[1], -1))
        ctx.save_for_backward(q, k, v, mask)
        return y.unflatten(0, ctx.shape).flatten(1, 2)

    @staticmethod
    def backward(ctx, grad):
        q, k, v, mask = ctx.saved_tensors
        grad = grad.unflatten(1, (ctx.shape[1], -1)).flatten(0, 1)
        grad_q = torch.empty_like(q)
        grad_k, grad_v = (torch.zeros_like(x, dtype=torch.float32) for x in (k, v))
        for some, rows, keys in BlockAttention.blocks(q, k, mask):
            probs = BlockAttention.probs(q, k, mask, some, rows, keys)
            grad_rows = grad[some, :, rows].flatten(1, 2)
            grad_v[some, keys] += probs.type_as(v).mT @ grad_rows
            grad_probs = grad_rows @ v[some, keys].mT
            mean = (probs * grad_probs).sum(-1, keepdim=True)
            grad_scores = probs.mul_(grad_probs - mean).type_as(q)
            grad_q[some, :, rows] = (grad_scores @ k[some, keys]).unflatten(1, (q.shape[1], -1))
            grad_k[some, keys] += grad_scores.mT @ q[some, :, rows].flatten(1, 2)
        grad_q = (grad_q * q.shape[-1] ** -0.5).unflatten(0, ctx.shape).flatten(1, 2)
        grad_k, grad_v = (x.type_as(q).unflatten(0, ctx.shape) for x in (grad_k, grad_v))
        return grad_q, grad_k, grad_v, None

    @staticmethod
    def blocks(q, k, mask):
        """Slices of the batch, of queries, and of the keys that these may see."""
        (_, share, n_queries, _), n_keys = q.shape, k.shape[1]
        size = min(BlockAttention.SIZE, n_queries)
        for some in slices(q, CACHE // (share * size * n_keys) + 1):
            for rows in slices(q[0, 0], size):
                yield some, rows, slice(rows.stop if mask is None else n_keys)

    @staticmethod
    def probs(q, k, mask, some, rows, keys):
        """Softmax of a block's scores: (batch, H / KV * rows, keys) float32."""
        scores = q[some, :, rows].flatten(1, 2) @ k[some, keys].mT
        by_head = scores.unflatten(1, (q.shape[1], -1))  # a view: (batch, H / KV, rows, keys)
        if mask is None:
            n = rows.stop - rows.start
            later = torch.ones(n, n, dtype=torch.bool).triu(1)
            by_head[..., rows].masked_fill_(later, -math.inf)
        else:
            by_head.masked_fill_(~mask[some, :, rows], -math.inf)
        return scores.softmax(-1, dtype=torch.float32)


def pack(trees, device="cpu"):
    """Lay trees out flat. Each is (trunk, branches): a list of tokens and a list of such lists.

    A branch's last token is only ever predicted, never read, so it is not run; its first one is
    predicted by the trunk's last token, in every branch.
    """
    tokens, positions, tree, spans = [], [], [], []
    predictors, targets, answer, n_answers = [], [], [], 0
    for n, (trunk, branches) in enumerate(trees):
        root, size = len(tokens), len(trunk)
        trunk_tokens = range(root, root + size)
        tokens += trunk
        positions += range(size)
        for i, branch in enumerate(branches):
            start, run = len(tokens), branch[:-1]
            tokens += run
            own = range(start, len(tokens))
            positions += range(size, size + len(run))
            predictors += [root + size - 1, *own]
            targets += branch
            answer += [n_answers] * len(branch)
            n_answers += 1
            if i == 0 or size < len(run):  # where the trunk is short a mask would cost more
                spans.append(((), [*trunk_tokens, *own]))
            elif run:
                spans.append((trunk_tokens, own))
        if not branches:
            spans.append(((), trunk_tokens))
        tree += [n] * (len(tokens) - root)
    groups, places = group_spans(spans, len(tokens))
    on_card = torch.device(device).type == "cuda"  # to which pinned memory goes without waiting

    def to(values, dtype=torch.long):
        values = torch.as_tensor(values, dtype=dtype)
        values = values.pin_memory() if on_card else values
        return values.to(device, non_blocking=on_card)

    for group in groups:
        group.queries, group.keys = to(group.queries), to(group.keys)
        group.mask = None if group.mask is None else to(group.mask, torch.bool)
    return Trees(*map(to, (tokens, tree, positions)), groups,
                 *map(to, (places, predictors, targets, answer)), n_answers)


PADDING = 1.5  # of a group's padded products of queries and keys to those within its spans


def group_spans(spans, n_tokens):
    """(groups of spans of like size, each token's place in the groups' outputs), as lists.

    A span is (trunk, own): the tokens that all of its queries see, and those that are queries too.
    Without a trunk attention is causal and needs no mask.
    """

    def size(span):
        trunk, own = map(len, span)
        return trunk > 0, trunk + own, own

    grouped, work = [], 0
    for span in sorted(spans, key=size, reverse=True):
        masked, n_keys, n_queries = size(span)
        work += n_keys * n_queries
        if grouped:
            members = [*grouped[-1], span]
            padded = len(members) * size(members[0])[1] * max(size(x)[2] for x in members)
        if not grouped or masked != size(members[0])[0] or padded > PADDING * work:
            grouped.append([])
            work = n_keys * n_queries
        grouped[-1].append(span)

    groups, places, offset = [], [0] * n_tokens, 0
    for members in grouped:
        queries, keys = pad([own for _, own in members]), pad([[*t, *own] for t, own in members])
        mask = None
        if members[0][0]:
            last = torch.tensor([len(trunk) for trunk, _ in members])[:, None, None]
            last = last + torch.arange(len(queries[0]))[None, :, None]  # the key of each query
            mask = (torch.arange(len(keys[0])) <= last)[:, None]
        for _, own in members:
            for i, token in enumerate(own):
                places[token] = offset + i  # of a trunk's token any place will do: all are equal
            offset += len(queries[0])
        groups.append(Group(queries, keys, mask))
    return groups, places


def pad(lists):
    """Lists of numbers made as long as the longest by repeating their first one."""
    longest = max(map(len, lists))
    return [[*numbers, *[numbers[0]] * (longest - len(numbers))] for numbers in lists]


# ---------------------------------------------------------------- the network


class RMSNorm(nn.Module):
    def __init__(self, size, eps):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x):
        return F.rms_norm(x.float(), (x.shape[-1],), self.weight, self.eps).type_as(x)


def rope_frequencies(config):
    """Radians a position for each pair of channels of a head: (D / 2,) float32.

    Llama 3's scaling slows the waves that are longer than the original context over
    low_freq_factor by `factor`, and those in between in part.
    """
    half = config.head_size // 2
    frequencies = 1 / config.rope_theta ** (torch.arange(half, device="cpu").float() / half)
    if config.rope_scaling is None:
        return frequencies
    scaling = config.rope_scaling
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    waves = scaling["original_max_position_embeddings"] * frequencies / (2 * math.pi)
    keep = ((waves - low) / (high - low)).clamp(0, 1)  # waves that fit into the original context
    return frequencies * (keep + (1 - keep) / scaling["factor"])


def rotate(x, cos, sin):
    """RoPE on x (T, H, D) with cos and sin (T, 1, D): halves (a, b) of a head are turned to
    (a cos - b sin, b cos + a sin); the minus is in sin."""
    x_float = x.float()
    return torch.addcmul(x_float * cos, x_float.roll(x.shape[-1] // 2, -1), sin).type_as(x)


LORA_ALPHA = 16  # the low-rank change of a weight is scaled by this over the rank


class Linear(nn.Linear):
    """x W^T, plus a low-rank change of it (LoRA, Hu et al. 2021, arXiv:2106.09685, Eq. 3).

    The change is scale * x A^T B^T with A (rank, inputs), B (outputs, rank); B starts as zero.
    """

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.lora_a = self.lora_b = None
        self.adapted = True  # False: as without the change
        self.packed = None  # the weight in oneDNN's layout; see for_inference

    def add_adapter(self, rank, generator):
        a = torch.randn(rank, self.in_features, generator=generator) * self.in_features**-0.5
        b = torch.zeros(self.out_features, rank)
        self.lora_a, self.lora_b = (nn.Parameter(x.to(self.weight.device)) for x in (a, b))
        self.scale = LORA_ALPHA / rank

    def forward(self, x):
        if self.packed is not None:
            return self.packed(x, self.bias)
        y = super().forward(x)
        if self.lora_a is None or not self.adapted:
            return y
        return torch.addmm(y, self.scale * F.linear(x, self.lora_a), self.lora_b.t())

    def merged(self):
        """The weight with the change added: (outputs, inputs) float32."""
        if self.lora_a is None:
            return self.weight.float()
        return self.weight.float() + self.scale * (self.lora_b @ self.lora_a)


class Attention(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.n_head, self.n_kv_head = config.n_head, config.n_kv_head
        self.head_size = config.head_size
        heads = config.n_head + 2 * config.n_kv_head
        self.qkv = Linear(config.n_embd, heads * self.head_size, bias=config.qkv_bias)
        self.out = Linear(config.n_head * self.head_size, config.n_embd, bias=False)
        self.q_norm = self.k_norm = None
        if config.qk_norm:
            self.q_norm = RMSNorm(config.head_size, config.norm_eps)
            self.k_norm = RMSNorm(config.head_size, config.norm_eps)

    def forward(self, x, trees, cos, sin, cache=None):
        heads = self.qkv(x).unflatten(-1, (-1, self.head_size))  # (T, H + 2 * KV, D)
        q, k, v = heads.split((self.n_head, self.n_kv_head, self.n_kv_head), dim=1)
        if self.q_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        return self.out(trees.attend(q, k, v, cache))


class MLP(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.gate_up = Linear(config.n_embd, 2 * config.n_hidden, bias=False)
        self.down = Linear(config.n_hidden, config.n_embd, bias=False)

    def forward(self, x):
        gate, up = self.gate_up(x).chunk(2, dim=-1)
        return self.down(F.silu(gate) * up)


class FiLM(nn.Module):
    """Scales and shifts channels as a latent says (Perez et al. 2018, arXiv:1709.07871).

    It starts as the identity.
    """

    def __init__(self, n_latent, n_channels):
        super().__init__()
        self.scale_shift = nn.Linear(n_latent, 2 * n_channels)
        nn.init.zeros_(self.scale_shift.weight)
        nn.init.zeros_(self.scale_shift.bias)

    def forward(self, x, z, rows):
        """x (T, C) under the latents z (B, n_latent), of which each token has one: rows (T,)."""
        scale, shift = self.scale_shift(z).index_select(0, rows).chunk(2, dim=-1)
        return torch.addcmul(x + shift, x, scale.type_as(x)).type_as(x)


class Block(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.norm_1 = RMSNorm(config.n_embd, config.norm_eps)
        self.attention = Attention(config)
        self.norm_2 = RMSNorm(config.n_embd, config.norm_eps)
        self.mlp = MLP(config)
        self.film_1 = self.film_2 = None
        if config.n_latent:
            self.add_film(config)

    def add_film(self, config):
        self.film_1, self.film_2 = (FiLM(config.n_latent, config.n_embd) for _ in range(2))

    def forward(self, x, trees, cos, sin, cache=None):
        a = self.norm_1(x)
        if trees.z is not None:
            a = self.film_1(a, trees.z, trees.tree)
        x = x + self.attention(a, trees, cos, sin, cache)
        a = self.norm_2(x)
        if trees.z is not None:
            a = self.film_2(a, trees.z, trees.tree)
        return x + self.mlp(a)


class Encoder(nn.Module):
    """A user's choices to the latent z: the posterior of a Gaussian whose prior is N(0, 1).

    Each pair is an observation of z with a precision, both of which a network reads off it. So
    their order does not matter, a pair that tells nothing weighs nothing, and no pairs give z = 0.
    """

    def __init__(self, n_features, n_latent, n_hidden=128):
        super().__init__()
        # Parameters, so that they are saved; they are trained like the gains of a norm.
        self.center = nn.Parameter(torch.zeros(n_features))
        self.scale = nn.Parameter(torch.ones(n_features))
        self.layers = nn.Sequential(
            nn.Linear(2 * n_features, n_hidden), nn.SiLU(),
            nn.Linear(n_hidden, n_hidden), nn.SiLU(),
            nn.Linear(n_hidden, 2 * n_latent),
        )

    def forward(self, pairs, present):
        """Mean and variance of z, (B, n_latent) each.

        pairs: (B, N, 2, F) features of the answer chosen and the one passed over; present: (B, N),
        0 where a user has fewer than N.
        """
        chosen, rejected = self.normalize(pairs).unbind(-2)
        x = torch.cat((chosen - rejected, chosen + rejected), dim=-1)
        observed, precision = self.layers(x).float().chunk(2, dim=-1)
        precision = F.softplus(precision) * present[..., None]
        total = 1 + precision.sum(1)
        return (precision * observed).sum(1) / total, 1 / total

    def normalize(self, features):
        return (features - self.center) * self.scale

    @torch.no_grad()
    def standardize(self, features):
        """Before training: make the normalised features (rows, F) have mean 0 and deviation 1.

        What does not vary keeps its scale.
        """
        deviation = features.std(0, correction=0)
        self.center.copy_(features.mean(0))
        self.scale.copy_(torch.where(deviation > 1e-6, 1 / deviation, 1.0))


class Transformer(nn.Module):
    """Decoder-only transformer; `forward` gives outputs, not logits."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.checkpointing = False  # True: blocks run again in the backward pass, to save memory
        # Given weights, or torch draws some, which imports seconds of code on the meta device.
        weight = torch.empty(config.vocab_size, config.n_embd)
        self.embedding = nn.Embedding(*weight.shape, _weight=weight)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.norm = RMSNorm(config.n_embd, config.norm_eps)
        if not config.tied:
            self.head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        self.packed_head = None
        self.encoder = self.reward_head = None
        if config.n_latent:
            self.add_encoder(config)
        self.features = None  # with an encoder: how it sees answers, a few_shot.Features
        self.register_buffer("frequencies", rope_frequencies(config), persistent=False)

    def add_encoder(self, config):
        """The encoder of choices, and the head that teaches it (`few_shot.rewards`)."""
        n_features = 2 * config.n_embd
        self.encoder = Encoder(n_features, config.n_latent)
        self.reward_head = nn.Linear(n_features, config.n_latent, bias=False)

    @property
    def head_weight(self):
        return (self.embedding if self.config.tied else self.head).weight

    @torch.no_grad()
    def initialize(self, generator):
        """Normal, 0.02 for embeddings, else 1 / sqrt(inputs), and less into the residual stream.

        GPT-2's 0.02 everywhere is a quarter of that in a model of 128 channels.
        """
        for name, p in self.named_parameters():
            if p.dim() == 2:
                into_residual = name.endswith(("attention.out.weight", "mlp.down.weight"))
                scale = 1 / math.sqrt(2 * self.config.n_layer) if into_residual else 1.0
                std = 0.02 if name == "embedding.weight" else p.shape[1] ** -0.5
                p.normal_(0.0, std * scale, generator=generator)
        return self

    def forward(self, trees, cache=None):
        """Outputs (T, C) of every token: of trees, which fill a given cache, or of a `Step`."""
        angles = trees.positions[:, None, None] * self.frequencies  # (T, 1, D / 2)
        cos, sin = angles.cos().repeat(1, 1, 2), angles.sin()
        sin = torch.cat((-sin, sin), dim=-1)
        x = self.embedding(trees.tokens)  # (T, C)
        for i, block in enumerate(self.blocks):
            if self.checkpointing and torch.is_grad_enabled():
                x = checkpoint(block, x, trees, cos, sin, use_reentrant=False,
                               preserve_rng_state=False)  # there is no dropout
            else:
                x = block(x, trees, cos, sin, None if cache is None else cache[i])
        return self.norm(x)

    def logits(self, outputs):
        """(rows, C) -> (rows, V), always float32: in bfloat16 likely tokens would tie."""
        with torch.autocast(outputs.device.type, enabled=False):
            if self.packed_head is not None:
                return self.packed_head(outputs)
            return outputs.float() @ self.head_weight.float().t()


def matmul_dtype(device):
    """What matrix products are computed in: autocast's type, else float32."""
    enabled = torch.is_autocast_enabled(device.type)
    return torch.get_autocast_dtype(device.type) if enabled else torch.float32


def adapt(model, rank, seed=0):
    """Make adapters that are there part of the weights, then say what is to be trained.

    With a rank each linear layer of the blocks gets a new adapter and all else is frozen; with
    rank 0 everything is trained.
    """
    generator = torch.Generator().manual_seed(seed)
    model.requires_grad_(not rank)
    for module in model.modules():
        if isinstance(module, Linear):
            if module.lora_a is not None:
                module.weight.data = module.merged().detach().to(module.weight.dtype)
                module.lora_a = module.lora_b = None
            if rank:
                module.add_adapter(rank, generator)


def add_latent(model, n_latent, seed=0):
    """Give a model an encoder of choices, and FiLM in every block; it starts as what it was."""
    model.config = replace(model.config, n_latent=n_latent)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model.add_encoder(model.config)
        for block in model.blocks:
            block.add_film(model.config)
    model.to(model.embedding.weight.device)


class AdaptersOff:
    """A model as it was before its adapters and its latent; it shares the weights."""

    def __init__(self, model):
        self.model = model

    def __getattr__(self, name):
        return getattr(self.model, name)

    def __call__(self, trees, cache=None):
        linears = [module for module in self.model.modules() if isinstance(module, Linear)]
        training = self.model.training
        self.model.eval()
        for module in linears:
            module.adapted = False
        try:
            return self.model(replace(trees, z=None), cache)
        finally:
            for module in linears:
                module.adapted = True
            self.model.train(training)


def from_weights(config, weights, device, dtype=torch.float32):
    """A transformer from (name, tensor) pairs, one tensor at a time: no second copy is made.

    dtype is that of the blocks' linear layers: in bfloat16 they take half of the memory, and are
    what autocast makes of them each time anyway. All else is float32. Raises ValueError when the
    tensors are not those of the config.
    """
    with torch.device("meta"):
        model = Transformer(config)
    missing = dict(model.named_parameters())
    for name, tensor in weights:
        parameter = missing.pop(name, None)
        if parameter is None or parameter.shape != tensor.shape:
            expected = "no such tensor" if parameter is None else list(parameter.shape)
            raise ValueError(f"{name}: {list(tensor.shape)}, expected {expected}")
        path, _, leaf = name.rpartition(".")
        module = model.get_submodule(path)
        kind = dtype if isinstance(module, Linear) else torch.float32
        loaded = torch.empty(tensor.shape, device=device, dtype=kind).copy_(tensor)
        setattr(module, leaf, nn.Parameter(loaded))
    if missing:
        raise ValueError(f"{next(iter(missing))}: missing")
    model.frequencies = rope_frequencies(config).to(device)
    return model


class Packed:
    """A weight (outputs, inputs) for inference on a CPU, in the layout of oneDNN.

    With single_rows a float32 weight is kept as it was too.
    """

    def __init__(self, weight, single_rows):
        self.layout = torch.ops.mkldnn._reorder_linear_weight(weight)
        self.dtype, self.parts = weight.dtype, None
        if single_rows and weight.dtype == torch.float32 and len(weight) % 4 == 0:
            self.parts = weight.unflatten(0, (4, -1))  # (4, outputs / 4, inputs)

    def __call__(self, x, bias=None):
        """x (rows, inputs) W^T + bias."""
        x = x.to(self.dtype)
        if len(x) == 1 and self.parts is not None and bias is None:
            # oneDNN and MKL read a float32 matrix for a single row at half of the memory's speed.
            return torch.bmm(self.parts, x.t().expand(4, -1, -1)).view(1, -1)
        return torch.ops.mkldnn._linear_pointwise(x, self.layout, bias, "none", [], "")


@torch.no_grad()
def for_inference(model, sampling=False):
    """Make adapters part of the weights, which on a CPU oneDNN lays out anew; returns the model.

    Few rows then run up to three times as fast, many a little faster. For sampling there is a
    second copy of the head, and of all float32 weights. The model cannot be trained or saved any
    more.
    """
    adapt(model, 0)
    linears = [module for module in model.modules() if isinstance(module, Linear)]
    kinds = {module.weight.dtype for module in linears if module.weight is not None}
    possible = model.embedding.weight.device.type == "cpu" and torch.backends.mkldnn.is_available()
    if possible and torch.bfloat16 in kinds:
        possible = torch.ops.mkldnn._is_mkldnn_bf16_supported()
    if possible and kinds:
        for module in linears:
            module.packed, module.weight = Packed(module.weight.detach(), sampling), None
        if sampling:
            model.packed_head = Packed(model.head_weight.detach().float(), sampling)
    return model


# ---------------------------------------------------------------- log-probabilities of answers


class TokenLogps(torch.autograd.Function):
    """log softmax of the logits at the targets: (A,) float32, nats.

    outputs: (A, C); weight: (V, C); targets: (A,). Logits exist for `chunk` tokens of the
    vocabulary at a time, in the forward pass and, made again, in the backward pass. They are
    computed in `dtype`, the softmax in float32.
    """

    @staticmethod
    def forward(ctx, outputs, weight, targets, chunk, dtype):
        outputs, weight = outputs.to(dtype), weight.to(dtype)
        target_logits = (outputs.float() * weight[targets].float()).sum(1, keepdim=True)
        base = target_logits.to(dtype)
        found = []
        for part in slices(weight, chunk):
            logits = relative_logits(outputs, weight[part], base)
            found.append(torch.cat([logits[few].float().logsumexp(1) for few in slices(logits)]))
            del logits  # before the next ones are made
        lse = torch.stack(found).logsumexp(0)
        ctx.save_for_backward(outputs, weight, targets, base, lse)
        ctx.chunk = chunk
        return (target_logits - base)[:, 0] - lse

    @staticmethod
    def backward(ctx, grad):
        outputs, weight, targets, base, lse = ctx.saved_tensors
        grad_outputs = torch.zeros_like(outputs, dtype=torch.float32)
        trained = ctx.needs_input_grad[1]
        grad_weight = torch.empty_like(weight, dtype=torch.float32) if trained else None
        for part in slices(weight, ctx.chunk):
            logits = relative_logits(outputs, weight[part], base)
            column = targets[:, None] - part.start  # of the target, where it is in this part
            inside = (column >= 0) & (column < logits.shape[1])
            column = column.clamp(0, logits.shape[1] - 1)
            for few in slices(logits):
                # d log p / d logits = (1 at the target, else 0) - softmax; it takes their place.
                factor = grad[few, None]
                softmax = logits[few].float().sub_(lse[few, None]).exp_()
                grad_logits = softmax.mul_(-factor)
                logits[few] = grad_logits.scatter_add_(1, column[few], factor * inside[few])
            grad_outputs += logits @ weight[part]
            if trained:
                grad_weight[part] = logits.t() @ outputs
            del logits
        return grad_outputs, grad_weight, None, None, None


def relative_logits(outputs, weight, base):
    """Logits less each row's base (rows, 1), which is about that of its target: (rows, tokens).

    Likely tokens then have small numbers, which bfloat16 rounds little.
    """
    return torch.addmm(-base, outputs, weight.t())


def answer_token_logps(model, trees, chunk=4096):
    """log p of every learned token: (A,) float32, nats. `pack` says which token predicts it."""
    outputs = model(trees).index_select(0, trees.predictors)  # (A, C)
    weight = getattr(model, "module", model).head_weight  # the model that DDP wraps
    dtype = matmul_dtype(outputs.device)
    return TokenLogps.apply(outputs, weight, trees.targets, chunk, dtype)


def answer_logps(model, trees):
    """Sum of log p over each answer's tokens: (n_answers,) float32, nats."""
    token_logps = answer_token_logps(model, trees)
    return token_logps.new_zeros(trees.n_answers).index_add(0, trees.answer, token_logps)


# ---------------------------------------------------------------- generation


@dataclass
class Step:
    """One new token for each of B sequences, which sees all that its sequence has stored."""

    tokens: torch.Tensor  # (B,)
    positions: torch.Tensor  # (B,)
    z: torch.Tensor | None  # (B, n_latent) what steers each sequence
    n_keys: int  # at least those of the longest sequence, the new token among them
    masked: bool  # False: all sequences have n_keys keys

    def __post_init__(self):
        device, self.mask = self.tokens.device, None
        self.tree = torch.arange(len(self.tokens), device=device)  # each sequence is a tree
        if self.masked:
            mask = torch.arange(self.n_keys, device=device) <= self.positions[:, None]
            self.mask = mask[:, None, None]  # (B, 1, 1, n_keys)

    def attend(self, q, k, v, cache):
        """Attention of q (B, H, D) over a layer's cache (2, B, KV, size, D): (B, H * D).

        The new k and v (B, KV, D) are stored first. The query heads that share a key/value head
        are the rows of one product.
        """
        if self.mask is None:
            cache[0, :, :, self.n_keys - 1], cache[1, :, :, self.n_keys - 1] = k, v
        else:
            cache[0][self.tree, :, self.positions] = k.to(cache.dtype)
            cache[1][self.tree, :, self.positions] = v.to(cache.dtype)
        keys, values = cache[:, :, :, : self.n_keys]
        q = q.unflatten(1, (k.shape[1], -1)).to(cache.dtype)  # (B, KV, H / KV, D)
        y = F.scaled_dot_product_attention(q, keys, values, attn_mask=self.mask)
        return y.flatten(1).type_as(k)


GRAPHS = ("cuda",)  # devices on which a step is captured


@functools.cache
def side_stream(device):
    """One for all captures: to each stream belongs memory of cuBLAS that is not given back."""
    return torch.cuda.Stream(device)


def capture(function, device):
    """A function without arguments as a CUDA graph: one launch instead of one for each kernel.

    Its inputs are read, and its outputs written, where they are now, so they have to stay. It is
    called once before the capture, as libraries set themselves up in a first call; to do it again
    must change nothing (docs.pytorch.org, "CUDA Graphs").
    """
    graph, stream = torch.cuda.CUDAGraph(), side_stream(device)
    with torch.cuda.device(device):
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            function()
        torch.cuda.current_stream().wait_stream(stream)
        with torch.cuda.graph(graph, stream=stream):
            outputs = function()

    def replay():
        graph.replay()
        return outputs

    return replay


class CapturedStep:
    """Steps of B sequences on a GPU: one graph, so attention always looks at the whole cache."""

    def __init__(self, model, tokens, positions, z, cache):
        self.tokens, self.positions = tokens.clone(), positions.clone()
        size = cache.shape[-2]

        def outputs():
            return model(Step(self.tokens, self.positions, z, size, masked=True), cache)

        self.outputs = capture(outputs, tokens.device)

    def __call__(self, tokens, positions):
        """Outputs (B, C), which the next call overwrites, of tokens (B,) at positions (B,)."""
        self.tokens.copy_(tokens)
        self.positions.copy_(positions)
        return self.outputs()


def next_token(logits, temperature=0.0, top_k=0, top_p=1.0, generator=None):
    """Choose one token from each row of logits (B, V): (B,). Temperature 0 is greedy."""
    if temperature < 1e-6:
        return logits.argmax(-1)
    logits = logits / temperature
    if top_k > 0:
        kth = logits.topk(min(top_k, logits.shape[-1])).values[:, -1:]
        logits = logits.masked_fill(logits < kth, -math.inf)
    if top_p < 1:
        values, order = logits.sort(descending=True)
        before = values.softmax(-1).cumsum(-1) - values.softmax(-1)  # mass of likelier tokens
        drop = torch.zeros_like(before, dtype=torch.bool).scatter(1, order, before >= top_p)
        logits = logits.masked_fill(drop, -math.inf)
    return torch.multinomial(logits.softmax(-1), 1, generator=generator)[:, 0]


@torch.no_grad()
def generate(model, prompts, ends, max_new_tokens, generator=None, z=None, **sampling):
    """Answers to prompts (lists of tokens of any lengths): lists of tokens, without the end token.

    An answer stops at any of the tokens `ends`, at `max_new_tokens` or at the model's block size.
    z (prompts, n_latent) steers each; `sampling` is passed to `next_token`. Finished sequences
    leave the batch; where steps are captured, when at most half of it goes on, as a smaller batch
    is captured anew.
    """
    config, device = model.config, model.embedding.weight.device
    dtype = matmul_dtype(device)
    room = [min(max_new_tokens, config.block_size - len(prompt)) for prompt in prompts]
    answers = [[] for _ in prompts]
    batch = [i for i in range(len(prompts)) if room[i] > 0]
    if not batch:
        return answers

    z = None if z is None else z[batch]
    trees, last = pack_prompts([prompts[i] for i in batch], z, device)
    size = max(len(prompts[i]) + room[i] for i in batch)
    shape = (2, len(batch), config.n_kv_head, size, config.head_size)
    cache = torch.zeros(config.n_layer, *shape, device=device, dtype=dtype)
    outputs = model(trees, cache).index_select(0, last)
    alone = not (torch.distributed.is_available() and torch.distributed.is_initialized())
    capturing = device.type in GRAPHS and alone  # FSDP's communication is not captured
    captured, alive = None, set(batch)
    while True:
        chosen = next_token(model.logits(outputs), generator=generator, **sampling)
        for i, token in zip(batch, chosen.tolist(), strict=True):
            if i in alive and token not in ends:
                answers[i].append(token)
            if token in ends or len(answers[i]) == room[i]:
                alive.discard(i)
        if not alive:
            return answers
        if len(alive) <= len(batch) / 2 or (len(alive) < len(batch) and not captured):
            going = [j for j, i in enumerate(batch) if i in alive]
            batch, captured = [batch[j] for j in going], None
            chosen, cache = chosen[going], cache[:, :, going]
            z = None if z is None else z[going]
        sizes = [len(prompts[i]) + len(answers[i]) for i in batch]
        positions = torch.tensor(sizes, device=device) - 1
        if capturing:
            captured = captured or CapturedStep(model, chosen, positions, z, cache)
            outputs = captured(chosen, positions)
        else:
            masked = min(sizes) < max(sizes)
            outputs = model(Step(chosen, positions, z, max(sizes), masked), cache)


def pack_prompts(prompts, z, device):
    """(trees, (B,) the last token of each prompt): one tree, whose trunk is what all begin with.

    Where each is steered by another z there is a tree for each.
    """
    shortest, first = min(map(len, prompts)) - 1, prompts[0]
    differ = (n for n in range(shortest) if any(prompt[n] != first[n] for prompt in prompts))
    shared = next(differ, shortest)  # each prompt keeps a last token of its own
    if z is not None and not (z == z[0]).all():
        shared = 0
        trees = pack([(prompt, []) for prompt in prompts], device)
    else:
        # One tree, which reads the first of the equal z. A branch's last token, 0, is not run.
        trees = pack([(first[:shared], [[*prompt[shared:], 0] for prompt in prompts])], device)
    trees.z, paths, end = z, [], shared
    for prompt in prompts:
        start, end = end, end + len(prompt) - shared
        paths.append([*range(shared), *range(start, end)])
    trees.paths = torch.tensor(pad(paths), device=device)
    return trees, torch.tensor([path[-1] for path in paths], device=device)
