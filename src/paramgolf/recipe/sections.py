"""The typed form of a recipe: one frozen dataclass for each section. Plain Python, no torch.

Every key a recipe may set is here, with its unit, range and default; `golf recipes NAME` prints the values.
A component with settings of its own (a model part, say) keeps them in its own frozen `Config`, under
`model.parts.<name>`; the recipe carries them as a plain table and the component checks them.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field

STRICT = ConfigDict(extra="forbid", allow_inf_nan=False)

MOST = 2**53  # beyond it a whole number is no exact float, and no longer one in every reader of JSON
Positive = Annotated[int, Field(ge=1, le=MOST)]
Count = Annotated[int, Field(ge=0, le=MOST)]
# Of a model. Bounded, because artifacts state them too, whoever made them.
Width = Annotated[int, Field(ge=1, le=1 << 20)]
Layers = Annotated[int, Field(ge=1, le=4096)]
MOST_LANES = 1 << 16
Lanes = Annotated[int, Field(ge=1, le=MOST_LANES)]
NonNegative = Annotated[float, Field(ge=0)]
Fraction = Annotated[float, Field(ge=0, le=1)]
Rate = Annotated[float, Field(ge=0, le=1e30)]  # of learning; its product with a stage's factor must be a float32


@dataclass(frozen=True, kw_only=True)
class DataSection:
    """The text, how it is tokenised, and in which order a run reads it."""

    __pydantic_config__ = STRICT
    train: str = ""  # file, folder or glob; "" = the built-in corpus
    val: str = ""  # validation text; "" = files with that word in their name, else a split of train
    tokenizer: str = ""  # a SentencePiece .model used unchanged; "" = train one on the training text
    vocab_size: Annotated[int, Field(ge=260, le=65535)] = 1024
    tokenizer_text_bytes: Positive = 16_000_000  # at most so much text trains the tokenizer
    # see data/orders.py; sequential = the reference's endless stream, packed = long rows of whole documents
    order: Literal["shuffled", "sequential", "coprime", "shuffled_shards", "packed"] = "shuffled"
    val_max_bytes: Positive = 300_000  # size limit of a validation split made by us
    caseops: bool = False  # capitals as operators before lower-case letters (#1729), in a tokenizer that we train
    text_field: str = "text"  # the JSONL key or parquet column that holds the text
    split_digits: bool = True  # of a tokenizer we train: every digit is a piece of its own


@dataclass(frozen=True, kw_only=True)
class ModelSection:
    """The shape of the transformer; `dim` and other widths in channels (see model/gpt.py)."""

    __pydantic_config__ = STRICT
    dim: Width = 512
    num_layers: Layers = 9
    num_heads: Width = 8
    num_kv_heads: Width = 4
    mlp_hidden: Width = 1024
    activation: str = "relu2"  # a name of model.ACTIVATIONS
    rope_base: Annotated[float, Field(gt=0)] = 10_000.0
    rope_dims: Count = 0  # rotated channels of a head, the first ones; 0 = all
    rope_ref_len: Count = 0  # > 0: longer inputs stretch the base by (T / ref)^(d / (d - 2)) (PR 114: 1024)
    # initial gain on the normalised queries, one learned value a head
    qk_gain: Annotated[float, Field(ge=-1e6, le=1e6)] = 1.5
    logit_softcap: NonNegative = 30.0  # 0 = none
    tie_embeddings: bool = True
    embed_init_std: Annotated[float, Field(gt=0)] = 0.005
    # orthogonal = PR 137's script (output maps too, scaled); orthogonal_zero = the same with output maps at zero
    init: Literal["default", "orthogonal", "orthogonal_zero"] = "default"
    skips: Literal["unet", "none"] = "unet"
    skip_gates: bool = False  # x <- g x + (1 - g) skip with a learned gate a channel, one half at the start (#1089)
    lanes_from: Annotated[int, Field(ge=-1)] = -1  # first layer of two-lane residuals (see model/lanes.py); -1 = none
    lane_merge: Literal["mean", "attn", "mlp"] = "mean"  # the lane, or their mean, that leaves the last layer
    norm_eps: Annotated[float, Field(gt=0)] = 1.1920929e-07
    ln_scale: bool = False  # branch inputs of layer l (from 0) times 1 / sqrt(l + 1)
    # width of the token embedding and head, mapped to and from `dim` (#1394); 0 = dim
    embed_dim: Annotated[int, Field(ge=0, le=1 << 20)] = 0
    parallel_from: Annotated[int, Field(ge=-1)] = -1  # from this layer on both branches read one input; -1 = none
    loop_layers: tuple[int, ...] = ()  # (first, last) of the layers that run again (depth recurrence); () = none
    loop_extra: Annotated[int, Field(ge=0, le=64)] = 0  # so many more times
    document_mask: bool = False  # a token sees nothing before the begin-of-document token of its own document
    parts: dict[str, dict[str, Any]] = field(default_factory=dict)  # optional components by registry name


@dataclass(frozen=True, kw_only=True)
class OptimSection:
    """The optimisers of matrices, scalars, embedding and head, and their rates before the schedule's factor."""

    __pydantic_config__ = STRICT
    matrix: str = "muon"  # a name of optim.MATRIX_OPTIMIZERS
    matrix_lr: Rate = 0.04
    scalar_lr: Rate = 0.04
    embed_lr: Rate = 0.05
    head_lr: Rate = 0.008  # untied head only
    momentum: Fraction = 0.95
    nesterov: bool = True
    ns_steps: Positive = 5
    ns_dtype: Literal["auto", "float32", "bfloat16", "fast"] = "auto"  # auto = bfloat16 on CUDA; fast = if quicker
    matrix_beta2: Fraction = 0.95  # normuon: decay of the row statistic
    beta1: Fraction = 0.9
    beta2: Fraction = 0.95
    adam_eps: Annotated[float, Field(gt=0)] = 1e-8
    weight_decay: NonNegative = 0.0  # decoupled, matrix group
    embed_weight_decay: NonNegative = 0.0
    scalar_weight_decay: NonNegative = 0.0
    grad_clip: NonNegative = 0.0  # global norm over all parameters after the exchange; 0 = off
    # of the matrices' gradients: all to all ranks, or each to the rank that orthogonalises it (banked Muon, #399)
    exchange: Literal["all_reduce", "reduce_scatter"] = "all_reduce"


@dataclass(frozen=True, kw_only=True)
class ScheduleSection:
    """How rates, momentum and weight decay go over a run."""

    __pydantic_config__ = STRICT
    warmup_steps: Count = 20  # throw-away steps that compile and warm up; all state is restored after them
    lr_warmup_steps: Count = 0  # linear ramp of the learning rate
    warmdown_iters: Count = 1200  # final decay: so many steps (in seconds at the measured rate if timed)
    warmdown_frac: Fraction = 0.0  # > 0: the final decay is this fraction of the budget instead
    warmdown_shape: Literal["linear", "cosine"] = "linear"
    min_lr: Fraction = 0.0  # floor of the multiplier
    momentum_warmup_start: Fraction = 0.85
    momentum_warmup_steps: Count = 500
    momentum_warmup_frac: Fraction = 0.0  # > 0: ramp over this fraction of the time budget instead (PR 137)
    loop_at: tuple[Fraction, ...] = (0.0,)  # part of the budget at which model.loop_extra begins; several: one for each
    decay_taper_at: Fraction = 1.0  # matrix weight decay falls linearly from this part of the budget on ...
    decay_taper_to: Fraction = 1.0  # ... to so much of itself at the end (#1729)


@dataclass(frozen=True, kw_only=True)
class TrainSection:
    """The batch, and how this machine computes it."""

    __pydantic_config__ = STRICT
    batch_tokens: Positive = 524_288  # global, for one optimizer step
    seq_len: Positive = 1024
    micro_batch_tokens: Count = 0  # tokens of one forward on one rank; 0 = chosen for the device
    seed: Count = 1337
    device: str = "auto"  # auto, cpu, cuda
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"  # of activations and matrix products
    compile: Literal["auto", "on", "off"] = "auto"
    kernels: Literal["auto", "fused", "plain"] = "auto"  # fused = our CPU kernels (bfloat16, AVX-512) where they fit
    attention: str = "auto"  # a name of model.ATTENTION_BACKENDS
    threads: Annotated[int, Field(ge=0, le=4096)] = 0  # CPU threads; 0 = all
    log_every: Positive = 10  # steps
    checkpoint_every: NonNegative = 300.0  # seconds between checkpoints; 0 = only on a signal and at the end
    checkpoint_every_steps: Count = 0  # steps between checkpoints; 0 = by seconds only


@dataclass(frozen=True, kw_only=True)
class AverageSection:
    """The average of the weights over training that is packed in place of the last ones."""

    __pydantic_config__ = STRICT
    kind: Literal["none", "ema", "swa"] = "none"
    decay: Fraction = 0.997  # EMA
    start_lr_mul: Fraction = 1.0  # SWA: collect while the multiplier is below this
    every: Positive = 200  # SWA: steps between snapshots
    select: Literal["always", "train"] = "always"  # train = keep the average only if better on held-out training text


@dataclass(frozen=True, kw_only=True)
class GridSection:
    """An integer grid: how a float row becomes codes. One object for QAT and export (see quant/grid.py)."""

    __pydantic_config__ = STRICT
    bits: Annotated[int, Field(ge=2, le=8)] = 8
    clip: Literal["rowmax", "quantile", "sdclip", "search", "mse"] = "rowmax"  # docs/quantisation.md
    clip_value: NonNegative = 0.0  # the quantile, or k of k x std
    row_weight: Fraction = 0.0  # sdclip with Hessians: k of a row times 1 + row_weight (its importance - 1) (#1412)
    floor: NonNegative = 0.0  # absolute lower bound of the scale (references: 1/31, 1/127); 0 = none
    eps: NonNegative = 0.0  # lower bound of the clip before the scale is formed (references: 1e-8, 1e-12)
    scale_dtype: Literal["float16", "float32"] = "float16"
    scale_bits: Annotated[int, Field(ge=2, le=10)] = 10  # mantissa bits that a float16 scale keeps; 10 = all
    round_scale_first: bool = True  # False = the references that code with the unrounded scale
    # full = the extra code -2^(b-1) may be used; half = it too, with the scale clip / (2^(b-1) - 1/2) (LQER)
    low_code: Literal["symmetric", "full", "half"] = "symmetric"
    packed: bool = False  # stored bit-packed (PR 107: four 6-bit codes in three bytes) instead of one byte a code


@dataclass(frozen=True, kw_only=True)
class RuleSection:
    """One precision rule: the first rule whose pattern and size fit a tensor decides how it is stored."""

    __pydantic_config__ = STRICT
    match: str = "*"  # glob on the tensor name; several joined by "|"; "@control", "@last_layers:2" also work
    min_size: Count = 0  # elements
    max_size: Count = 0  # elements; 0 = any
    ndim: Count = 0  # 0 = any
    store: str = "float16"  # float16, float32 or the name of a grid


@dataclass(frozen=True, kw_only=True)
class QuantSection:
    """How weights become codes: the grids, which tensor is on which, and quantisation while training."""

    __pydantic_config__ = STRICT
    method: str = "rtn"  # a name of quant.QUANTIZERS
    calibration_tokens: Positive = 65_536  # training text read before packing by what weighs inputs, over all ranks
    grids: dict[str, GridSection] = field(default_factory=dict)
    rules: tuple[RuleSection, ...] = ()  # in order; non-float tensors are kept as they are before any rule
    coarse_grid: str = ""  # the matrices that bear it best go on this grid instead of their own ...
    coarse_fraction: Fraction = 0.0  # ... this fraction of the matrices on grids of more bits
    input_share: NonNegative = 0.0  # tied embedding: its use as input, in mean diagonals of what the head reads
    awq_columns: Count = 0  # so many neighbouring columns, the most salient of all matrices, keep 8 bits (gptq only)
    lqer_tensors: Count = 0  # matrices, those of largest error, that get a low-rank correction; 0 = none
    lqer_rank: Positive = 4
    lqer_group: Positive = 64  # entries of the right factor that share a scale
    # fake quantisation of linear weights in training: "export" (each tensor's own grid), a grid, or "" = none
    qat: str = ""
    qat_start: Fraction = 0.0  # fraction of the budget at which QAT switches on
    post_qat: str = ""  # post-training QAT phase over all large matrices (PR 107): as `qat`; "" = none
    post_qat_frac: Fraction = 0.05  # fraction of the budget given to that phase
    post_qat_lr: Rate = 1e-3


@dataclass(frozen=True, kw_only=True)
class PackSection:
    """How codes become bytes, and what the byte cap counts."""

    __pydantic_config__ = STRICT
    codec: str = "auto"  # a name of pack.CODECS, or auto = the smallest
    level: int = -1  # -1 = the codec's strongest
    count: Literal["file", "challenge"] = "file"  # what the byte cap counts
    fit: bool = False  # choose the clips of sdclip grids so that the file fills budget.bytes
    fit_tokens: Positive = 16_384  # training text on which `fit` measures what an error costs


@dataclass(frozen=True, kw_only=True)
class ScoreSection:
    """How the validation text is cut into windows (see score/windows.py)."""

    __pydantic_config__ = STRICT
    seq_len: Count = 0  # 0 = train.seq_len
    stride: Count = 0  # sliding score beside the standard one; 0 = none
    batch_tokens: Positive = 65_536  # tokens of one scoring forward over all ranks
    windows: Literal["exact", "full_only", "with_tail"] = "exact"  # the last two = the references' window rules
    lanes: Lanes = 1  # independent lanes cut at document starts, so that a decoder can run them in parallel


@dataclass(frozen=True, kw_only=True)
class TttSection:
    """Test-time training: the model goes on learning from text it has scored, and only from that (docs/ttt.md)."""

    __pydantic_config__ = STRICT
    # lora = adapters for each document; phased = lora with pauses that train all weights on finished documents;
    # sgd = all weights on every scored stretch of the stream; none = no such score unless asked for
    kind: Literal["none", "lora", "phased", "sgd"] = "none"
    adapt: tuple[Literal["head", "q", "k", "v", "o", "mlp"], ...] = ("head", "q", "k", "v", "o", "mlp")
    rank: Positive = 8  # of an adapter
    alpha: NonNegative = 0.0  # an adapter's output is scaled by alpha / rank; 0 = by 1
    lr: Rate = 1e-2  # right for models of a megabyte; those of 16 MB took 1e-4
    beta1: Annotated[float, Field(ge=0, lt=1)] = 0.0
    beta2: Annotated[float, Field(ge=0, lt=1)] = 0.99
    eps: Annotated[float, Field(gt=0)] = 1e-10
    weight_decay: NonNegative = 0.0
    grad_steps: Positive = 1  # after each chunk
    chunk: Positive = 32  # targets scored, then learned from
    # (tokens, chunk) in rising order: documents of at most so many tokens go in chunks of that size (#2014). In stream
    # order, where nothing says how long a document will be, every one begins so
    short_chunks: Annotated[tuple[tuple[Positive, Positive], ...], Field(max_length=8)] = ()
    context: Count = 0  # tokens a chunk is predicted from, itself included; 0 = score.seq_len
    batch_docs: Positive = 64  # documents side by side
    order: Literal["stream", "longest"] = "stream"  # longest = similar lengths together, longest first (the records)
    keep_a: bool = False  # the inner maps of a batch begin where the last one's ended (#1767)
    seed: Count = 0  # of the adapters' inner maps
    prefix_docs: Count = 2500  # phased: the last pause is after so many documents
    phases: Positive = 3  # phased: pauses
    sgd_lr: Rate = 1e-3  # phased, sgd: falls as a cosine over the chunks
    sgd_momentum: Annotated[float, Field(ge=0, lt=1)] = 0.9
    sgd_epochs: Positive = 1
    sgd_chunk_tokens: Positive = 32_768
    sgd_rows: Positive = 32  # rows of score.seq_len tokens in a step
    sgd_clip: NonNegative = 1.0  # global norm of the gradient; 0 = off


@dataclass(frozen=True, kw_only=True)
class TiltSection:
    """The causal n-gram tilt of a score (see score/tilt.py)."""

    __pydantic_config__ = STRICT
    orders: tuple[Annotated[int, Field(ge=1, le=64)], ...] = ()  # lengths of the contexts looked up; () = no tilt
    boost: Annotated[float, Field(ge=0, le=20)] = 2.0  # added to the logit of the token expected
    threshold: Fraction = 0.8  # share of a context's past followers that the expected one must have
    min_count: Positive = 2  # times a context must have been seen


@dataclass(frozen=True, kw_only=True)
class NgramLevel:
    """One table of the n-gram cache: contexts of `order` tokens, kept for a document or for the whole text."""

    __pydantic_config__ = STRICT
    scope: Literal["document", "text"] = "document"
    order: Annotated[int, Field(ge=0, le=64)] = 1
    strength: Annotated[float, Field(ge=0, le=1e9)] = 1.0  # counts that the level below weighs
    discount: Fraction = 0.8  # taken off each token seen, and given to the level below


@dataclass(frozen=True, kw_only=True)
class NgramSection:
    """The n-gram cache of a score (see score/ngram.py)."""

    __pydantic_config__ = STRICT
    levels: Annotated[tuple[NgramLevel, ...], Field(max_length=16)] = ()  # applied in order; () = no cache


@dataclass(frozen=True, kw_only=True)
class BudgetSection:
    """What a run may spend: seconds, steps and tokens of training, bytes of the artifact; 0 = unbound."""

    __pydantic_config__ = STRICT
    seconds: NonNegative = 0.0  # training budget; 0 = unbound
    steps: Count = 0
    tokens: Count = 0
    bytes: Count = 0  # cap of the artifact
    eval_seconds: NonNegative = 0.0  # scoring stops being allowed after this; 0 = unbound
    clock: Literal["strict", "challenge"] = "strict"  # challenge = starts after compilation and warm-up
    count_packing: bool = True  # averaging, calibration and quantisation must also end inside `seconds`


@dataclass(frozen=True, kw_only=True)
class StageSection:
    """What changes at a point of the run: from `at` (fraction of the budget) on, the sizes that are set hold; `lr_mul`
    is of this stage alone."""

    __pydantic_config__ = STRICT
    at: Fraction = 0.0
    batch_tokens: Count = 0  # 0 = as before
    seq_len: Count = 0
    lr_mul: Annotated[float, Field(ge=0, le=1e6)] = 1.0


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """One system, resolved: everything a run needs to know."""

    __pydantic_config__ = STRICT
    name: Annotated[str, Field(pattern=r"^[^/\x00]+$")]  # run folders begin with it
    title: str = ""
    extends: str = ""
    data: DataSection = field(default_factory=DataSection)
    model: ModelSection = field(default_factory=ModelSection)
    optim: OptimSection = field(default_factory=OptimSection)
    schedule: ScheduleSection = field(default_factory=ScheduleSection)
    train: TrainSection = field(default_factory=TrainSection)
    average: AverageSection = field(default_factory=AverageSection)
    quant: QuantSection = field(default_factory=QuantSection)
    pack: PackSection = field(default_factory=PackSection)
    score: ScoreSection = field(default_factory=ScoreSection)
    ttt: TttSection = field(default_factory=TttSection)
    tilt: TiltSection = field(default_factory=TiltSection)
    ngram: NgramSection = field(default_factory=NgramSection)
    budget: BudgetSection = field(default_factory=BudgetSection)
    stages: tuple[StageSection, ...] = ()


def scored_seq_len(recipe: Recipe) -> int:
    """Tokens of a window of the score."""
    return recipe.score.seq_len or recipe.train.seq_len


def trained_seq_len(recipe: Recipe) -> int:
    """Tokens of context at the end of training: what positions are made for and what calibration reads."""
    if not recipe.stages:
        return recipe.train.seq_len
    ordered = sorted(recipe.stages, key=lambda stage: stage.at)
    return next((stage.seq_len for stage in reversed(ordered) if stage.seq_len), recipe.train.seq_len)
