"""The products of a model: which matrices a rank multiplies for a micro-batch, and how many operations that is."""

from dataclasses import dataclass

from exprl_megatron.models.architecture import Architecture


@dataclass(frozen=True)
class Gemm:
    """`copies` products of [m, k] by [k, n]; m counts tokens in a forward pass."""

    m: float
    n: float
    k: float
    copies: float = 1.0

    @property
    def flops(self) -> float:
        """Multiplications and additions."""
        return 2.0 * self.m * self.n * self.k * self.copies

    def input_gradient(self) -> "Gemm":
        """The product that gives the gradient of the input: [m, n] by [n, k]."""
        return Gemm(self.m, self.k, self.n, self.copies)

    def weight_gradient(self) -> "Gemm":
        """The product that gives the gradient of the weight: [n, m] by [m, k]."""
        return Gemm(self.n, self.k, self.m, self.copies)


def attention_gemms(architecture: Architecture, tokens: float, tp: int) -> tuple[Gemm, Gemm]:
    """A rank's projections around attention: queries, keys and values together; then the output."""
    width = architecture.heads * architecture.head_dim
    both = width + 2 * architecture.kv_groups * architecture.head_dim
    return Gemm(tokens, both / tp, architecture.hidden), Gemm(tokens, architecture.hidden, width / tp)


def mlp_gemms(architecture: Architecture, tokens: float, tp: int, ep: int, etp: int) -> tuple[Gemm, Gemm]:
    """A rank's MLP: gate and up together, then down; of experts one product each, tokens spread evenly."""
    if architecture.experts is None:
        ffn = architecture.ffn / tp
        return Gemm(tokens, 2 * ffn, architecture.hidden), Gemm(tokens, architecture.hidden, ffn)
    experts = architecture.experts
    local = experts.count / ep
    rows = tokens / tp * experts.chosen * etp / local
    ffn = experts.ffn / etp
    return Gemm(rows, 2 * ffn, architecture.hidden, local), Gemm(rows, architecture.hidden, ffn, local)


def router_gemm(architecture: Architecture, tokens: float, tp: int) -> Gemm:
    """The product that scores experts; 0 operations without experts."""
    count = architecture.experts.count if architecture.experts else 0
    return Gemm(tokens / tp, count, architecture.hidden)


def head_gemm(architecture: Architecture, tokens: float, tp: int) -> Gemm:
    """The output layer."""
    return Gemm(tokens, architecture.vocabulary / tp, architecture.hidden)


def attention_flops(architecture: Architecture, sequence_length: float) -> float:
    """Operations of causal attention's two products, forward, per token of a layer: the mean token sees half."""
    return 2.0 * 2.0 * architecture.heads * architecture.head_dim * sequence_length / 2


def layer_flops(architecture: Architecture) -> float:
    """Operations of a layer's linear products, forward, per token."""
    gemms = attention_gemms(architecture, 1, 1) + mlp_gemms(architecture, 1, 1, 1, 1)
    return sum(gemm.flops for gemm in gemms) + router_gemm(architecture, 1, 1).flops


def model_flops(architecture: Architecture, sequence_length: float, training: bool = True) -> float:
    """Operations per token that the model itself needs, attention counted causally, nothing recomputed.

    The embedding is a look-up and counts nothing; a training step is three times the forward pass.
    """
    layer = layer_flops(architecture) + attention_flops(architecture, sequence_length)
    forward = architecture.layers * layer + head_gemm(architecture, 1, 1).flops
    return forward * (3.0 if training else 1.0)


def linear_parameters(architecture: Architecture) -> tuple[float, float]:
    """Parameters of a layer's matrices: (what every rank of a replica shares out, the experts)."""
    dense = sum(gemm.n * gemm.k for gemm in attention_gemms(architecture, 1, 1))
    mlp = sum(gemm.n * gemm.k * gemm.copies for gemm in mlp_gemms(architecture, 1, 1, 1, 1))
    if architecture.experts is None:
        return dense + mlp, 0.0
    return dense + architecture.experts.count * architecture.hidden, mlp
