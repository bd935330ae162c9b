"""Methods against their implementations in peft, on one linear layer with the same numbers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import mora_jax as mj

pytestmark = pytest.mark.peers
peft, torch = (pytest.importorskip(name, reason="the extra peers is not installed") for name in ("peft", "torch"))

IN, OUT, RANK = 9, 6, 4


def draw(seed, *shape):
    return (0.5 * np.random.default_rng(seed).normal(size=shape)).astype(np.float32)


def lora(**options):
    return peft.LoraConfig(r=RANK, lora_alpha=6, target_modules=["layer"], **options)


# Our configuration, theirs, and where their tensors lie: our name → (suffix of theirs, whether it is transposed).
FACTORS = {"lora_a": ("lora_A.default.weight", True), "lora_b": ("lora_B.default.weight", True)}
MAGNITUDE = {"magnitude": ("lora_magnitude_vector.default.weight", False)}
TRIANGLES = {"oft_r": ("oft_R.default.weight", False)}
VECTOR = {"ia3_l": ("ia3_l.default", False)}
CASES = {
    "lora": (mj.LoRAConfig(RANK, 6.0), lora(), FACTORS),
    "rslora": (mj.RsLoRAConfig(RANK, 6.0), lora(use_rslora=True), FACTORS),
    "dora": (mj.DoRAConfig(RANK, 6.0), lora(use_dora=True), FACTORS | MAGNITUDE),
    "rslora with dora": (
        mj.RsLoRAConfig(RANK, 6.0, use_dora=True),
        lora(use_dora=True, use_rslora=True),
        FACTORS | MAGNITUDE,
    ),
    "vera": (
        mj.VeRAConfig(rank=RANK),
        peft.VeraConfig(r=RANK, target_modules=["layer"]),
        {"vera_d": ("vera_lambda_d.default", False), "vera_b_scale": ("vera_lambda_b.default", False)},
    ),
    "adalora": (
        mj.AdaLoRAConfig(RANK, 6.0, target_rank=2),
        peft.AdaLoraConfig(init_r=RANK, target_r=2, lora_alpha=6, total_step=10, target_modules=["layer"]),
        {
            "lora_a": ("lora_A.default", True),
            "lora_e": ("lora_E.default", False),
            "lora_b": ("lora_B.default", True),
        },
    ),
    "hira": (
        mj.HiRAConfig(rank=RANK),
        peft.HiraConfig(r=RANK, target_modules=["layer"]),
        {"hira_a": ("hira_A.default", True), "hira_b": ("hira_B.default", True)},
    ),
    "randlora": (
        mj.RandLoRAConfig(RANK, 6.0, projection_prng_key=2),
        peft.RandLoraConfig(r=RANK, randlora_alpha=6, projection_prng_key=2, target_modules=["layer"]),
        {"randlora_lambda": ("randlora_lambda.default", False), "randlora_gamma": ("randlora_gamma.default", False)},
    ),
    "miss": (
        mj.MiSSConfig(rank=RANK),
        peft.MissConfig(r=RANK, target_modules=["layer"]),
        {"miss_block": ("miss_block.default", False)},
    ),
    "miss of form mini": (
        mj.MiSSConfig(rank=RANK, form="mini", mini_rank=3),
        peft.MissConfig(r=RANK, mini_r=3, init_weights="mini", target_modules=["layer"]),
        {"miss_block": ("miss_block.default", False)},
    ),
    "oft": (mj.OFTConfig(3), peft.OFTConfig(oft_block_size=3, target_modules=["layer"]), TRIANGLES),
    "oft by inverse": (
        mj.OFTConfig(blocks=3, use_cayley_neumann=False),
        peft.OFTConfig(r=3, oft_block_size=0, use_cayley_neumann=False, target_modules=["layer"]),
        TRIANGLES,
    ),
    "oft of shared blocks": (
        mj.OFTConfig(3, block_share=True, num_cayley_neumann_terms=7),
        peft.OFTConfig(oft_block_size=3, block_share=True, num_cayley_neumann_terms=7, target_modules=["layer"]),
        TRIANGLES,
    ),
    "ia3": (
        mj.IA3Config(targets="all-linear", feedforward=()),
        peft.IA3Config(target_modules=["layer"], feedforward_modules=[]),
        VECTOR,
    ),
    "ia3 on inputs": (
        mj.IA3Config(targets="all-linear", feedforward=("layer",)),
        peft.IA3Config(target_modules=["layer"], feedforward_modules=["layer"]),
        VECTOR,
    ),
}


class Ours(nnx.Module):
    def __init__(self):
        self.layer = nnx.Linear(IN, OUT, rngs=nnx.Rngs(0))
        self.layer.kernel[...], self.layer.bias[...] = jnp.asarray(draw(0, IN, OUT)), jnp.asarray(draw(1, OUT))

    def __call__(self, x):
        return self.layer(x)


class Theirs(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(IN, OUT)
        self.layer.weight.data, self.layer.bias.data = (
            torch.tensor(draw(0, IN, OUT).T.copy()),
            torch.tensor(draw(1, OUT)),
        )

    def forward(self, x):
        return self.layer(x)


@pytest.mark.parametrize("case", CASES)
def test_outputs_and_gradients_agree(case):
    config, their_config, tensors = CASES[case]
    ours, theirs = Ours(), peft.get_peft_model(Theirs(), their_config)
    mj.attach(ours, config, rngs=nnx.Rngs(1))
    if case == "vera":
        layer = theirs.base_model.model.layer
        ours.layer.adapter.vera_a[...] = jnp.asarray(layer.vera_A["default"].numpy().T)
        ours.layer.adapter.vera_b[...] = jnp.asarray(layer.vera_B["default"].numpy().T)
    parameters = {name.removeprefix("base_model.model.layer."): value for name, value in theirs.named_parameters()}
    for i, (name, (suffix, transposed)) in enumerate(tensors.items()):
        variable = getattr(ours.layer.adapter, name)
        start = parameters[suffix].detach().numpy()
        if name in ("magnitude", "ia3_l", "vera_d", "vera_b_scale", "lora_e"):
            np.testing.assert_allclose(variable[...], start.reshape(-1), rtol=1e-5)
        value = np.asarray(variable[...]) + draw(10 + i, *variable.shape)
        variable[...] = jnp.asarray(value)
        parameters[suffix].data = torch.tensor((value.T if transposed else value).reshape(start.shape).copy())
    x, slopes = draw(2, 5, IN), draw(3, 5, OUT)
    expected = theirs(torch.tensor(x))
    np.testing.assert_allclose(ours(x), expected.detach().numpy(), atol=1e-5)
    (expected * torch.tensor(slopes)).sum().backward()
    graphdef, adapters, frozen = mj.partition(ours)
    found = jax.grad(lambda a: jnp.sum(nnx.merge(graphdef, a, frozen)(x) * slopes))(adapters)["layer"]["adapter"]
    for name, (suffix, transposed) in tensors.items():
        theirs_gradient = parameters[suffix].grad.numpy()
        theirs_gradient = theirs_gradient.T if transposed else theirs_gradient.reshape(found[name].shape)
        np.testing.assert_allclose(found[name][...], theirs_gradient, atol=2e-5, err_msg=name)
