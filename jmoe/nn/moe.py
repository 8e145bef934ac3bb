"""Feed-forward layers: the dense SwiGLU, the routed experts, and their sum.

Shapes: B batch, T position, S this device's positions, D hidden, F MLP dimension (this
device's part), E expert (this device's), N = B * S tokens, R tokens that an exchange
brings, K = top_k; a leading 2 holds SwiGLU's gate and up halves side by side.

On a mesh, an MLP is divided over `tensor`: all positions of the group go through each
device's part of it, and the parts' results are summed as they go back to the positions'
devices. Tokens reach the experts of other devices by `parallel.exchange`.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import linen as nn

from jmoe.balance import homes
from jmoe.config import MoEConfig, RouterConfig
from jmoe.nn.choices import Picks, Routing
from jmoe.nn.linear import DotGeneral, Linear, weight
from jmoe.nn.measured import Measured, beside
from jmoe.nn.parameter import FP8, INT4, MATRIX, TWO_MATRICES, Parameter
from jmoe.nn.router import Router
from jmoe.nn.tokens import UNTOLD, Tokens
from jmoe.ops import dot, fp8, grouped
from jmoe.ops.matrices import MatrixDims
from jmoe.ops.swiglu import after_swiglu
from jmoe.parallel import collectives
from jmoe.parallel.exchange import Exchanged, exchange
from jmoe.parallel.exchange_picks import exchange_picks
from jmoe.parallel.shedding import shed
from jmoe.parallel.travel import Group

EXPERTS = "experts"  # the routed experts' name in a `MoE`


class SwiGLU(nn.Module):
    """`(silu(x @ gate) * (x @ up)) @ down` (Shazeer, arXiv 2002.05202)."""

    mlp_dim: int
    init_std: float
    dot_general: DotGeneral = dot.dot_general

    @nn.compact
    def __call__(self, x_BSD: jax.Array) -> jax.Array:
        gate_up = Linear(
            (2, collectives.share(self.mlp_dim, "tensor", "mlp_dim")),
            ("embed", None, "mlp"),
            self.init_std,
            self.dot_general,
            TWO_MATRICES,
            name="gate_up",
        )(collectives.all_gather(x_BSD, "tensor", 1))
        out_BTD = Linear(
            (x_BSD.shape[-1],),
            ("mlp", "embed"),
            self.init_std,
            after_swiglu(self.dot_general),
            name="down",
        )(gate_up)
        return collectives.reduce_scatter(out_BTD, "tensor", 1)


class RoutedExperts(nn.Module):
    """The routed experts' weights, applied to each token's chosen ones.

    They multiply by the recipe of `dot_general` (`fp8.recipe_of`), or in x's dtype.
    `apart` is for a pipeline, as in `jmoe.ops.grouped`.

    In `router_state` may be `home`, int32 [E], of all devices' experts: weights then
    are of the experts whose homes are here (see `nn.model.with_homes`). Or [E, C], if
    experts have copies (`jmoe.balance.homes.of_choices`). And `limit`, int32: of the
    choices that a device computes (`jmoe.parallel.shedding`).
    """

    cfg: MoEConfig
    init_std: float
    dot_general: DotGeneral = dot.dot_general
    apart: bool = False

    @nn.compact
    def __call__(self, x_BSD: jax.Array, routing: Routing | Picks) -> Exchanged:
        cfg = self.cfg
        home = self.get_variable("router_state", "home")
        places = cfg.router.num_experts if home is None else homes.num_places(home)
        experts = collectives.share(places, "expert", "num_experts")
        mlp = collectives.share(cfg.expert_mlp_dim, "tensor", "expert_mlp_dim")
        hidden = x_BSD.shape[-1]
        gate_up_ED2F = weight(
            self,
            "gate_up",
            (experts, hidden, 2, mlp),
            self.init_std,
            _of_experts(("expert", "embed", None, "mlp"), TWO_MATRICES),
        )
        down_EFD = weight(
            self,
            "down",
            (experts, mlp, hidden),
            self.init_std,
            _of_experts(("expert", "mlp", "embed"), MATRIX),
        )

        def compute(
            x: jax.Array, group: Group, after: jax.Array | None = None
        ) -> jax.Array:
            """Returns this device's part of a group of experts that are here."""
            return grouped.BACKENDS[cfg.backend](
                *(x, group.expert_RK, group.gate_RK, *group.weights),
                recipe=fp8.recipe_of(self.dot_general),
                rows=group.rows,
                is_bound=group.is_bound,
                remat=cfg.remat == "activations",
                apart=self.apart,
                after=after,
            )

        weights = gate_up_ED2F, down_EFD
        if isinstance(routing, Picks):
            y_BSD = exchange_picks(x_BSD, *routing, compute, weights)
            none = jnp.int32(0)
            return Exchanged(y_BSD.reshape(-1, hidden), none, none, {})

        def apply(x_RD: jax.Array, groups: Sequence[Group]) -> jax.Array:
            """Returns the experts' output of the tokens of all the tensor group."""
            x = collectives.all_gather(x_RD, "tensor", 0)
            first, *others = (_of_tensor_group(group) for group in groups)
            y = compute(x, first)
            for group in others:
                y += compute(x, group, after=y)
            return collectives.reduce_scatter(y, "tensor", 0)

        x_ND = x_BSD.reshape(-1, hidden)
        expert_NK, router = self._at_homes(routing.expert_NK)
        dropped, limit = jnp.int32(0), self.get_variable("router_state", "limit")
        if limit is not None:
            chosen = expert_NK, routing.gate_NK
            expert_NK, dropped = shed(*chosen, limit, router.num_experts)
        found = exchange(
            x_ND,
            expert_NK,
            routing.gate_NK,
            apply,
            weights,
            cfg.exchange,
            router,
            recipe=fp8.recipe_of(self.dot_general),
            remat=cfg.remat == "activations",
        )
        return found._replace(dropped_sending=found.dropped_sending + dropped)

    def _at_homes(self, expert_NK: jax.Array) -> tuple[jax.Array, RouterConfig]:
        """Returns where the chosen experts live, and what is known of such choices."""
        router, home = self.cfg.router, self.get_variable("router_state", "home")
        if home is None:
            return expert_NK, router
        first, peers = collectives.axis_index("expert"), collectives.axis_size("expert")
        keeping = homes.keeping_groups(router, peers, homes.num_places(home))
        return homes.of_choices(expert_NK, home, first), keeping


def _of_tensor_group(group: Group) -> Group:
    """Returns the choices of all the tensor group's tokens."""
    expert, gate = (
        collectives.all_gather(choices, "tensor", 0) for choices in group[:2]
    )
    rows = group.rows * collectives.axis_size("tensor")
    return group._replace(expert_RK=expert, gate_RK=gate, rows=rows)


def _of_experts(dims: tuple[str | None, ...], matrix: MatrixDims) -> Parameter:
    return Parameter(dims=dims, matrix=matrix, is_hidden=True, formats=(FP8, INT4))


class MoE(nn.Module):
    """Shared experts for every token plus `top_k` routed ones, [B, S, D] each way."""

    cfg: MoEConfig
    init_std: float
    dot_general: DotGeneral = dot.dot_general
    apart: bool = False  # see `RoutedExperts`

    @nn.compact
    def __call__(
        self,
        x_BSD: jax.Array,
        tokens: Tokens = UNTOLD,
    ) -> tuple[jax.Array, Measured]:
        cfg = self.cfg
        router = Router(cfg.router, self.init_std, name="router")
        routing, measured = router(x_BSD, tokens)
        experts = RoutedExperts(
            cfg, self.init_std, self.dot_general, self.apart, name=EXPERTS
        )
        routed = experts(x_BSD, routing)
        out_BSD = routed.y_ND.reshape(x_BSD.shape)
        assert measured.load is not None, "a router counts"
        load = measured.load._replace(
            dropped_sending=routed.dropped_sending,
            dropped_receiving=routed.dropped_receiving,
        )
        if cfg.num_shared_experts:
            # n experts that every token visits are one expert n times as wide.
            mlp_dim = cfg.num_shared_experts * cfg.expert_mlp_dim
            shared = SwiGLU(mlp_dim, self.init_std, self.dot_general, name="shared")
            out_BSD += shared(x_BSD)
        measured = measured._replace(load=load)
        return out_BSD, beside(measured, Measured(None, {}, routed.metrics))
