"""One training step put together from a model and a configuration: what `train` runs and `plan` compiles."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import optax
from flax import nnx
from jax.sharding import Mesh

from mora_jax.adapters.attach import detach, partition
from mora_jax.adapters.sites import adapted_sites
from mora_jax.models.decoder import Decoder
from mora_jax.models.own import OwnModel, draws
from mora_jax.training.adalora import RankBudget
from mora_jax.training.config.schema import Config, adapter_config
from mora_jax.training.optimizer import check_given, make_schedule, scheduled, with_rates
from mora_jax.training.preferences import PreferenceLoss, reference_of
from mora_jax.training.relora import Restarts
from mora_jax.training.sharding.mesh import put
from mora_jax.training.sharding.rules import Placement, axes_of, placed
from mora_jax.training.sharding.runner import JitRunner, PmapRunner
from mora_jax.training.state import Arrays, Structure, TrainState, flat_arrays, initial_state
from mora_jax.training.step import StepConfig, make_step


class Assembly(NamedTuple):
    """A step and what it works on.

    Attributes:
        structure: of the model, split.
        adapters, frozen: its arrays (or their shapes), by path, not placed yet.
        optimizer: of the trained ones.
        placement: where arrays lie; None under `pmap`.
        runner: runs, or only lowers, the step.
        restarts: those of the method; None without.
        budget: AdaLoRA's; None without.
        settings: what is fixed in the step.
        rates: see `make_optimizer`.
    """

    structure: Structure
    adapters: Arrays
    frozen: Arrays
    optimizer: optax.GradientTransformation
    placement: Placement | None
    runner: JitRunner | PmapRunner
    restarts: Restarts | None
    budget: RankBudget | None
    settings: StepConfig
    rates: Mapping[str, float] | None

    def initial_state(self, seed: int) -> TrainState:
        """The state before the first step, not placed yet."""
        return initial_state(self.adapters, self.optimizer, seed)

    def placed_state(self, seed: int) -> TrainState:
        """The state before the first step, on its devices; the optimizer's part is made in its shards."""
        if isinstance(self.runner, PmapRunner) or len(self.runner.devices) == 1:
            return self.runner.place(self.initial_state(seed))
        places = self.runner.places(jax.eval_shape(lambda: self.initial_state(seed)))
        adapters = put(self.adapters, places.adapters)
        optimizer = jax.jit(self.optimizer.init, out_shardings=places.optimizer)(adapters)
        start = initial_state({}, optax.identity(), seed)._replace(adapters=adapters, optimizer=optimizer)
        return put(start, places)


def assemble(
    model: nnx.Module, config: Config, steps: int, mesh: Mesh, given: optax.GradientTransformation | None = None
) -> Assembly:
    """The step that `config` asks for.

    Args:
        model: with its adapters; its arrays may be shapes alone. Arrays are put where the mesh stores them, except
            under `pmap`, which copies them later.
        config: the whole run.
        steps: of the run.
        mesh: as `make_mesh` makes it; its devices may be such as are only described.
        given: the optimizer, in place of what the configuration names.
    """
    pmap = config.mesh.pmap
    method = adapter_config(config.adapter, steps)
    restarts = Restarts.of(method, steps)
    # Checkpoints hold what restarts change: in one form on all backends.
    placement = None if pmap else placed(mesh, model, flat=None if restarts is None else False)
    abstract = any(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in jax.tree.leaves(nnx.state(model)))
    if placement is not None and placement.partitioner is not None and not abstract:
        put_model(placement, model)
    graphdef, adapters, frozen = partition(model)
    structure = Structure(graphdef, adapters, frozen)
    rates = getattr(method, "rates", None)
    arrays = flat_arrays(adapters), flat_arrays(frozen)
    schedule = None
    if given is None:
        schedule = make_schedule(config.optimizer, steps, restarts)
        optimizer = scheduled(config.optimizer, schedule, rates)
    else:
        optimizer = with_rates(given, rates)
        check_given(optimizer, arrays[0])
    budget = RankBudget.of(model, *arrays)
    if budget is not None:
        optimizer = budget.around(optimizer)
    settings = StepConfig(
        partitioner=None if placement is None else placement.partitioner,
        dropout=any(place.adapter.config.dropout > 0 for place in adapted_sites(model)) or draws(model),
        axis_name="data" if pmap else None,
        divisor=config.loss.constant if config.loss.divided_by == "constant" else None,
        neftune_alpha=config.train.neftune_alpha,
        balance_weight=config.loss.balance_weight,
        kl_weight=config.loss.kl_weight,
        base=base_structure(model) if config.loss.kl_weight else None,
        penalty=None if budget is None else budget.penalty,
        packed=config.data.packing,
        loss=_preference_loss(config, model),
        view=None if isinstance(model, Decoder) else OwnModel,
    )
    step = make_step(structure, optimizer, schedule, settings)
    runner: JitRunner | PmapRunner
    if placement is None:
        runner = PmapRunner(step, mesh.size)
    else:
        runner = JitRunner(step, mesh, placement.table(adapters, frozen))
    return Assembly(structure, *arrays, optimizer, placement, runner, restarts, budget, settings, rates)


def _preference_loss(config: Config, model: nnx.Module) -> PreferenceLoss | None:
    """The objective of preferences; None for the loss of tokens."""
    objective = config.loss.preference
    if objective is None:
        return None
    base = base_structure(model) if reference_of(config, model) == "base" else None
    return PreferenceLoss(objective, config.loss.settings, config.loss.sft_term, base)


def put_model(placement: Placement, model: nnx.Module) -> None:
    """Puts every array of a model where it is stored, one after the other; base weights are there already."""
    for _, node in nnx.iter_graph(model):
        if isinstance(node, nnx.Variable):
            array = node.get_value()
            node.set_value(put(array, placement.stored(axes_of(node), array.shape)))


def base_structure(model: nnx.Module) -> Structure:
    """The structure of a model without its adapters, for `StepConfig.base`."""
    base = nnx.merge(*nnx.split(model))
    detach(base)
    return Structure(*nnx.split(base))


def shapes_in_place(runner: JitRunner, tree: Any) -> Any:
    """The shapes of a tree with the shardings that the runner gives its arrays: enough to lower a step."""

    def described(leaf: Any, sharding: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

    return jax.tree.map(described, tree, runner.places(tree))
