"""The transformer: RMSNorm, RoPE, SwiGLU, grouped-query attention, over batches of token trees.

A *tree* is a trunk (the prompt) followed by its branches (the answers). A batch is one flat run of
tokens: no prefix runs twice and no position is padded. Attention alone looks at the tokens as
(trees, longest tree), and a mask keeps every branch from seeing its sibling.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint


@dataclass(frozen=True)
class ModelConfig:
    vocab_size: int
    block_size: int = 512  # longest path, trunk and one branch, in tokens
    n_layer: int = 4
    n_head: int = 4
    n_kv_head: int = 2  # each key/value head serves n_head / n_kv_head query heads
    n_embd: int = 128
    n_hidden: int = 384  # width inside the SwiGLU
    rope_theta: float = 10000.0
    rope_scaling: dict | None = None  # Llama 3's: factor, low_freq_factor, high_freq_factor, ...
    norm_eps: float = 1e-5
    qk_norm: bool = True  # RMSNorm on each query and key head, as in Qwen3
    qkv_bias: bool = False  # as in Qwen2
    head_size: int = 0  # channels of a head; 0: n_embd / n_head
    tied: bool = True  # the embedding is the output head too

    def __post_init__(self):
        if not self.head_size:
            object.__setattr__(self, "head_size", self.n_embd // self.n_head)


# ---------------------------------------------------------------- token trees


@dataclass
class Trees:
    """A batch of token trees. T tokens, B trees, L tokens in the longest, A learned tokens."""

    tokens: torch.Tensor  # (T,) every tree's trunk, then its branches
    positions: torch.Tensor  # (T,) distance from the root; a branch goes on from its trunk
    tree: torch.Tensor  # (T,) which tree a token is in
    slots: torch.Tensor  # (T,) a token's place in attention's padded view of B * L
    mask: torch.Tensor  # (B, 1, L, keys) bool, True where a query may look
    predictors: torch.Tensor  # (A,) the token whose output predicts the learned token
    targets: torch.Tensor  # (A,) the learned token
    answer: torch.Tensor  # (A,) which answer, counted over the whole batch, it belongs to
    n_answers: int

    def pad(self, x):
        """(T, H, D) -> (B, H, L, D), zeros where there is no token."""
        B, L = self.mask.shape[0], self.mask.shape[2]
        padded = x.new_zeros(B * L, *x.shape[1:]).index_copy(0, self.slots, x)
        return padded.view(B, L, *x.shape[1:]).transpose(1, 2)

    def unpad(self, x):
        """(B, H, L, D) -> (T, H * D)."""
        return x.transpose(1, 2).flatten(2).flatten(0, 1).index_select(0, self.slots)


def pack(trees, device="cpu"):
    """Lay trees out flat. Each is (trunk, branches): a list of tokens and a list of such lists.

    A branch's last token is only ever predicted, never read, so it is not run; its first one is
    predicted by the trunk's last token, in every branch.
    """
    tokens, positions, tree, branch = [], [], [], []
    predictors, targets, answer, n_answers = [], [], [], 0
    for b, (trunk, branches) in enumerate(trees):
        last = len(tokens) + len(trunk) - 1
        runs = [(0, trunk)] + [(i + 1, answer_[:-1]) for i, answer_ in enumerate(branches)]
        for i, run in runs:
            if i > 0:
                predictors += [last, *range(len(tokens), len(tokens) + len(run))]
                targets += branches[i - 1]
                answer += [n_answers] * len(branches[i - 1])
                n_answers += 1
            start = len(trunk) if i > 0 else 0
            positions += range(start, start + len(run))
            tokens += run
            tree += [b] * len(run)
            branch += [i] * len(run)
    as_tensor = lambda values: torch.tensor(values, dtype=torch.long)  # noqa: E731
    tree, branch = as_tensor(tree), as_tensor(branch)
    sizes = torch.bincount(tree, minlength=len(trees))
    within = torch.arange(len(tree)) - (sizes.cumsum(0) - sizes)[tree]
    L = int(sizes.max())
    branch_at = torch.full((len(trees), L), -1)  # padding: no token looks at it
    branch_at[tree, within] = branch
    queries, keys = branch_at[:, :, None], branch_at[:, None, :]
    mask = ((keys == 0) | (keys == queries)) & torch.ones(L, L, dtype=torch.bool).tril()
    return Trees(
        *(as_tensor(values).to(device) for values in (tokens, positions)),
        tree.to(device),
        (tree * L + within).to(device),
        mask[:, None].to(device),
        *(as_tensor(values).to(device) for values in (predictors, targets, answer)),
        n_answers,
    )


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
    frequencies = config.rope_theta ** (-torch.arange(half, device="cpu").float() / half)
    if config.rope_scaling is None:
        return frequencies
    scaling = config.rope_scaling
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    waves = scaling["original_max_position_embeddings"] * frequencies / (2 * math.pi)
    keep = ((waves - low) / (high - low)).clamp(0, 1)  # waves that fit into the original context
    return frequencies * (keep + (1 - keep) / scaling["factor"])


def rotate(x, cos, sin):
    """RoPE on x (T, H, D) with cos and sin (T, 1, D / 2): the two halves of a head are rotated."""
    a, b = x.float().chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1).type_as(x)


def tree_attention(q, k, v, mask):
    """Attention of q (B, H, L, D) over k, v (B, H, keys, D) where mask (B, 1, L, keys) is True."""
    if q.device.type != "cpu":
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    # In bfloat16 the CPU kernel's backward pass takes 2.6 times as long as in float32.
    with torch.autocast("cpu", enabled=False):
        y = F.scaled_dot_product_attention(q.float(), k.float(), v.float(), attn_mask=mask)
    return y.type_as(q)


class Linear(nn.Linear):
    """x W^T, plus a low-rank change of it (LoRA, Hu et al. 2021, arXiv:2106.09685, Eq. 3).

    The change is scale * x A^T B^T with A (rank, inputs), B (outputs, rank); B starts as zero.
    """

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.lora_a = self.lora_b = None
        self.adapted = True  # False: as without the change

    def add_adapter(self, rank, generator):
        a = torch.randn(rank, self.in_features, generator=generator) * self.in_features**-0.5
        b = torch.zeros(self.out_features, rank)
        self.lora_a, self.lora_b = (nn.Parameter(x.to(self.weight.device)) for x in (a, b))
        self.scale = LORA_ALPHA / rank

    def forward(self, x):
        y = super().forward(x)
        if self.lora_a is None or not self.adapted:
            return y
        return y + self.scale * F.linear(F.linear(x, self.lora_a), self.lora_b)

    def merged(self):
        """The weight with the change added: (outputs, inputs) float32."""
        if self.lora_a is None:
            return self.weight.float()
        return self.weight.float() + self.scale * (self.lora_b @ self.lora_a)


LORA_ALPHA = 16  # the change is scaled by this over the rank


class Attention(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.n_head, self.n_kv_head = config.n_head, config.n_kv_head
        self.head_size = config.head_size
        heads = config.n_head + 2 * config.n_kv_head
        self.qkv = Linear(config.n_embd, heads * self.head_size, bias=config.qkv_bias)
        self.out = Linear(config.n_head * self.head_size, config.n_embd, bias=False)
        norm = RMSNorm if config.qk_norm else lambda size, eps: nn.Identity()
        self.q_norm = norm(self.head_size, config.norm_eps)
        self.k_norm = norm(self.head_size, config.norm_eps)

    def forward(self, x, trees, cos, sin, cache=None):
        x = self.qkv(x).unflatten(-1, (-1, self.head_size))  # (T, H + 2 * KV, D)
        q, k, v = x.split((self.n_head, self.n_kv_head, self.n_kv_head), dim=1)
        q, k = rotate(self.q_norm(q), cos, sin), rotate(self.k_norm(k), cos, sin)
        if cache is None:
            k, v = trees.pad(k), trees.pad(v)  # (B, KV, L, D)
        else:
            k, v = extend(cache, k, v, trees)  # (B, KV, tokens so far, D)
        group = self.n_head // self.n_kv_head
        if group > 1:
            k, v = k.repeat_interleave(group, dim=1), v.repeat_interleave(group, dim=1)
        y = tree_attention(trees.pad(q), k, v, trees.mask)  # (B, H, L, D)
        return self.out(trees.unpad(y))


class MLP(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.gate_up = Linear(config.n_embd, 2 * config.n_hidden, bias=False)
        self.down = Linear(config.n_hidden, config.n_embd, bias=False)

    def forward(self, x):
        gate, up = self.gate_up(x).chunk(2, dim=-1)
        return self.down(F.silu(gate) * up)


class Block(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.norm_1 = RMSNorm(config.n_embd, config.norm_eps)
        self.attention = Attention(config)
        self.norm_2 = RMSNorm(config.n_embd, config.norm_eps)
        self.mlp = MLP(config)

    def forward(self, x, trees, cos, sin, cache=None):
        x = x + self.attention(self.norm_1(x), trees, cos, sin, cache)
        return x + self.mlp(self.norm_2(x))


class Transformer(nn.Module):
    """Decoder-only transformer; `forward` gives outputs, not logits."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.checkpointing = False  # True: blocks run again in the backward pass, to save memory
        self.embedding = nn.Embedding(config.vocab_size, config.n_embd)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.norm = RMSNorm(config.n_embd, config.norm_eps)
        if not config.tied:
            self.head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        self.register_buffer("frequencies", rope_frequencies(config), persistent=False)

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
        """Outputs (T, C) of every token of the batch."""
        angles = trees.positions[:, None, None] * self.frequencies  # (T, 1, D / 2)
        cos, sin = angles.cos(), angles.sin()
        x = self.embedding(trees.tokens)  # (T, C)
        for i, block in enumerate(self.blocks):
            if self.checkpointing and torch.is_grad_enabled():
                x = checkpoint(block, x, trees, cos, sin, use_reentrant=False)
            else:
                x = block(x, trees, cos, sin, None if cache is None else cache[i])
        return self.norm(x)

    def logits(self, outputs):
        """(rows, C) -> (rows, V), always float32."""
        return float_logits(outputs, self.head_weight)


def float_logits(outputs, weight):
    """outputs (rows, C) by weight (V, C): (rows, V) float32; bfloat16 would round log p by 0.1."""
    with torch.autocast(outputs.device.type, enabled=False):
        return outputs.float() @ weight.float().t()


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


def has_adapters(model):
    return any("lora_" in name for name, _ in model.named_parameters())


class AdaptersOff:
    """A model as it was before its adapters; it shares the weights."""

    def __init__(self, model):
        self.model = model

    def __getattr__(self, name):
        return getattr(self.model, name)

    def __call__(self, trees, cache=None):
        linears = [module for module in self.model.modules() if isinstance(module, Linear)]
        for module in linears:
            module.adapted = False
        try:
            return self.model(trees, cache)
        finally:
            for module in linears:
                module.adapted = True


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


# ---------------------------------------------------------------- log-probabilities of answers


class TokenLogps(torch.autograd.Function):
    """log softmax of the logits at the targets: (A,) float32, nats.

    outputs: (A, C); weight: (V, C); targets: (A,). Logits exist for `chunk` rows at a time, in the
    forward pass and, made again, in the backward pass; all of them never do.
    """

    @staticmethod
    def forward(ctx, outputs, weight, targets, chunk):
        logps, normalizers = torch.empty(2, len(targets), device=outputs.device)
        for i in range(0, len(targets), chunk):
            rows = slice(i, i + chunk)
            logits = float_logits(outputs[rows], weight)
            normalizers[rows] = logits.logsumexp(1)
            logps[rows] = logits.gather(1, targets[rows, None])[:, 0] - normalizers[rows]
        ctx.save_for_backward(outputs, weight, targets, normalizers)
        ctx.chunk = chunk
        return logps

    @staticmethod
    def backward(ctx, grad):
        outputs, weight, targets, normalizers = ctx.saved_tensors
        grad_outputs = torch.empty_like(outputs)
        grad_weight = torch.zeros_like(weight) if ctx.needs_input_grad[1] else None
        for i in range(0, len(targets), ctx.chunk):
            rows = slice(i, i + ctx.chunk)
            # d log p / d logits = (1 at the target, else 0) - softmax
            grad_logits = float_logits(outputs[rows], weight).sub_(normalizers[rows, None]).exp_()
            grad_logits.mul_(-grad[rows, None])
            grad_logits.scatter_add_(1, targets[rows, None], grad[rows, None])
            grad_outputs[rows] = grad_logits @ weight.float()
            if grad_weight is not None:
                grad_weight += grad_logits.t() @ outputs[rows].float()
        return grad_outputs, grad_weight, None, None


def answer_token_logps(model, trees, chunk=512):
    """log p of every learned token: (A,) float32, nats. The one place where t predicts t + 1."""
    outputs = model(trees).index_select(0, trees.predictors)  # (A, C)
    return TokenLogps.apply(outputs, model.head_weight, trees.targets, chunk)


def answer_logps(model, trees):
    """Sum of log p over each answer's tokens: (n_answers,) float32, nats."""
    token_logps = answer_token_logps(model, trees)
    return token_logps.new_zeros(trees.n_answers).index_add(0, trees.answer, token_logps)


# ---------------------------------------------------------------- generation


def extend(cache, k, v, trees):
    """Store k and v (T, KV, D) in one layer's cache (2, B, KV, size, D), each at its position.

    Returns all keys and values that the mask speaks of: (B, KV, keys, D) each.
    """
    cache[0][trees.tree, :, trees.positions] = k.to(cache.dtype)
    cache[1][trees.tree, :, trees.positions] = v.to(cache.dtype)
    return cache[:, :, :, : trees.mask.shape[-1]].type_as(k)


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


@torch.inference_mode()
def generate(model, prompts, end_token, max_new_tokens, generator=None, **sampling):
    """Answers to prompts (lists of tokens of any lengths): lists of tokens, without the end token.

    An answer stops at `end_token`, at `max_new_tokens` or at the model's block size; `sampling` is
    passed to `next_token`. Finished sequences leave the batch.
    """
    config, device = model.config, model.embedding.weight.device
    autocast = torch.is_autocast_enabled(device.type)
    dtype = torch.get_autocast_dtype(device.type) if autocast else model.embedding.weight.dtype
    room = [min(max_new_tokens, config.block_size - len(prompt)) for prompt in prompts]
    answers = [[] for _ in prompts]
    alive = [i for i in range(len(prompts)) if room[i] > 0]  # the answers still being written
    if not alive:
        return answers
    lengths = torch.tensor([len(prompts[i]) for i in alive], device=device)
    size = max(len(prompts[i]) + room[i] for i in alive)
    shape = (2, len(alive), config.n_kv_head, size, config.head_size)
    cache = torch.zeros(config.n_layer, *shape, device=device, dtype=dtype)
    trees = pack([(prompts[i], []) for i in alive], device)
    last = lengths.cumsum(0) - 1  # the outputs that predict
    while True:
        outputs = model(trees, cache).index_select(0, last)
        chosen = next_token(model.logits(outputs), generator=generator, **sampling)
        going = []
        for j, (i, token) in enumerate(zip(alive, chosen.tolist(), strict=True)):
            if token != end_token:
                answers[i].append(token)
                if len(answers[i]) < room[i]:
                    going.append(j)
        if not going:
            return answers
        if len(going) < len(alive):
            alive = [alive[j] for j in going]
            chosen, lengths, cache = chosen[going], lengths[going], cache[:, :, going]
        last = torch.arange(len(alive), device=device)
        trees = decoding_step(chosen, lengths, last)
        lengths = lengths + 1


def decoding_step(tokens, positions, sequences):
    """One new token for each sequence, as trees that look at all the keys stored so far."""
    keys = torch.arange(int(positions.max()) + 1, device=tokens.device)
    mask = keys <= positions[:, None]  # (B, keys)
    empty = tokens[:0]
    return Trees(tokens, positions, sequences, sequences, mask[:, None, None], *[empty] * 3, 0)
