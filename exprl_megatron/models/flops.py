"""FLOPs of a model: the matrix products of a rank for a micro-batch, and their operations."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from exprl_megatron.models.architecture import Architecture
from exprl_megatron.models.delta_net import CHUNK, DeltaNet


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
        """Return the product that gives the gradient of the input: [m, n] by [n, k]."""
        return Gemm(self.m, self.k, self.n, self.copies)

    def weight_gradient(self) -> "Gemm":
        """Return the product that gives the gradient of the weight: [n, m] by [m, k]."""
        return Gemm(self.n, self.k, self.m, self.copies)


def attention_gemms(architecture: Architecture, tokens: float, tp: int) -> tuple[Gemm, Gemm]:
    """Return a rank's projections around attention or a gated delta net: all of its inputs together; then the
    output.
    """
    if (net := architecture.delta_net) is not None:
        return (
            Gemm(tokens, net.projected / tp, architecture.hidden),
            Gemm(tokens, architecture.hidden, net.values / tp),
        )
    width = architecture.heads * architecture.head_dim
    both = (2 if architecture.output_gate else 1) * width + 2 * architecture.kv_groups * architecture.head_dim
    return Gemm(tokens, both / tp, architecture.hidden), Gemm(tokens, architecture.hidden, width / tp)


def mlp_gemms(architecture: Architecture, tokens: float, tp: int, ep: int, etp: int) -> tuple[Gemm, ...]:
    """Return a rank's MLP: gate and up together, then down; of experts one product each, tokens spread evenly."""
    if architecture.experts is None:
        return _swiglu_gemms(tokens, architecture.ffn / tp, architecture.hidden)
    return (
        *routed_gemms(architecture, tokens, tp, ep, etp),
        *_swiglu_gemms(tokens, architecture.experts.shared_ffn / tp, architecture.hidden),
    )


def routed_gemms(architecture: Architecture, tokens: float, tp: int, ep: int, etp: int) -> tuple[Gemm, ...]:
    """Return the products of the experts that a router chooses from; none without."""
    experts = architecture.experts
    if experts is None:
        return ()
    local = experts.count / ep
    rows = tokens / tp * experts.top_k * etp / local
    return _swiglu_gemms(rows, experts.ffn / etp, architecture.hidden, local)


def _swiglu_gemms(rows: float, ffn: float, hidden: int, copies: float = 1.0) -> tuple[Gemm, ...]:
    return (Gemm(rows, 2 * ffn, hidden, copies), Gemm(rows, hidden, ffn, copies)) if ffn else ()


def router_gemm(architecture: Architecture, tokens: float, tp: int) -> Gemm:
    """Return the product that scores experts; 0 operations without experts."""
    count = architecture.experts.count if architecture.experts else 0
    return Gemm(tokens / tp, count, architecture.hidden)


def head_gemm(architecture: Architecture, tokens: float, tp: int) -> Gemm:
    """Return the output layer."""
    return Gemm(tokens, architecture.vocabulary / tp, architecture.hidden)


def attention_flops(architecture: Architecture, sequence_length: float) -> float:
    """Return the operations of causal attention's two products, forward, per token of a layer.

    The mean token sees half of the sequence; in a layer with a window w, tokens see all before them up to w, then w.
    A gated delta net's do not grow with the sequence (see delta_net_flops).
    """
    if architecture.delta_net is not None:
        return delta_net_flops(architecture.delta_net)
    seen = sequence_length / 2
    if architecture.window is not None and architecture.window < sequence_length:
        seen = architecture.window - architecture.window**2 / (2 * sequence_length)
    return 2.0 * 2.0 * architecture.heads * architecture.head_dim * seen


def delta_net_flops(net: DeltaNet) -> float:
    """Return the operations of a gated delta net between its projections, forward, per token.

    Per value head with keys of K and values of V: reading the state for the correction and for the output, and writing
    it, 2 K V each; within a chunk of C tokens, of which the mean token sees half, C (3 K + 2 V): products of keys with
    keys and with queries, the triangular system for both, and the output (arXiv 2412.06464, section 3.3). The
    convolution has 2 operations for each channel and tap.
    """
    within = CHUNK * (3 * net.key_dim + 2 * net.value_dim)
    return net.value_heads * (6.0 * net.key_dim * net.value_dim + within) + 2 * net.kernel * net.convolved


def layer_flops(architecture: Architecture) -> float:
    """Return the operations of a layer's linear products, forward, per token."""
    gemms = (*attention_gemms(architecture, 1, 1), *mlp_gemms(architecture, 1, 1, 1, 1))
    return sum(gemm.flops for gemm in gemms) + router_gemm(architecture, 1, 1).flops


def linear_flops(architecture: Architecture) -> float:
    """Return the operations of all layers' linear products, forward, per token."""
    return sum(count * layer_flops(kind) for kind, count in architecture.kinds().items())


def model_flops(architecture: Architecture, sequence_length: float, training: bool = True) -> float:
    """Return the operations per token that the model itself needs, attention counted causally, nothing recomputed.

    The embedding is a look-up and counts nothing; a training step is three times the forward pass.
    """
    return _forward_flops(architecture)(sequence_length) * (3.0 if training else 1.0)


def sequence_flops(architecture: Architecture, lengths: Iterable[int]) -> list[float]:
    """Return the operations of a forward pass over a sequence of each of `lengths`, counted as in model_flops."""
    of_token = _forward_flops(architecture)
    return [length * of_token(length) for length in lengths]


def _forward_flops(architecture: Architecture) -> Callable[[float], float]:
    """Return a function from a sequence's length to the operations per token of a forward pass over it."""
    kinds = architecture.kinds()
    linear = linear_flops(architecture) + head_gemm(architecture, 1, 1).flops
    return lambda length: linear + sum(count * attention_flops(kind, length) for kind, count in kinds.items())


def linear_parameters(architecture: Architecture, layers: Iterable[int] | None = None) -> tuple[float, float]:
    """Return the parameters of the matrices of `layers` (None: of all layers): (those that the ranks of a replica
    share, those of experts).
    """
    found = [0.0, 0.0]
    for kind, count in architecture.kinds(layers).items():
        routed = sum(gemm.n * gemm.k * gemm.copies for gemm in routed_gemms(kind, 1, 1, 1, 1))
        gemms = (*attention_gemms(kind, 1, 1), *mlp_gemms(kind, 1, 1, 1, 1))
        router = router_gemm(kind, 1, 1)
        found[0] += count * (sum(gemm.n * gemm.k * gemm.copies for gemm in gemms) - routed + router.n * router.k)
        found[1] += count * routed
    return found[0], found[1]
