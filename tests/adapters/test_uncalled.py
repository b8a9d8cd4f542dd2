"""Weights that are read past their module: an adapter there would train nothing, so it is refused."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
import transformers as T
from architectures import MODELS
from torch import nn

import lowrank
from lowrank import LoraConfig
from lowrank.errors import InputError

IDS = torch.arange(3, 15).view(2, 6)
SMALL = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
CONVS = {"conv_dim": (8, 8), "conv_stride": (5, 2), "conv_kernel": (10, 3), "num_feat_extract_layers": 2}
SPEECH = {"num_conv_pos_embeddings": 4, "num_conv_pos_embedding_groups": 2, "layerdrop": 0.0, "mask_time_prob": 0.0}
MLA = {"q_lora_rank": 8, "kv_lora_rank": 8, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 8}
XVECTOR = {"tdnn_dim": (8, 8), "tdnn_kernel": (3, 3), "tdnn_dilation": (1, 1), "xvector_output_dim": 8}


def longcat() -> nn.Module:
    config = T.LongcatFlashConfig(
        vocab_size=32, hidden_size=16, num_layers=1, num_hidden_layers=2, num_attention_heads=2, ffn_hidden_size=16,
        head_dim=8, moe_topk=2, n_routed_experts=4, zero_expert_num=2, expert_ffn_hidden_size=16, **MLA,
    )  # fmt: skip
    return T.LongcatFlashForCausalLM(config)


def gemma3n() -> nn.Module:
    config = T.Gemma3nTextConfig(
        **SMALL, vocab_size=32, vocab_size_per_layer_input=32, hidden_size_per_layer_input=8, num_key_value_heads=1,
        head_dim=8, laurel_rank=4, num_kv_shared_layers=0, layer_types=["full_attention"], activation_sparsity_pattern=[0.0],
    )  # fmt: skip
    return T.Gemma3nForCausalLM(config)


def mobilebert() -> nn.Module:
    sizes = {"embedding_size": 8, "intra_bottleneck_size": 16, "num_feedforward_networks": 1}
    return T.MobileBertForMaskedLM(T.MobileBertConfig(vocab_size=32, **SMALL, **sizes))


def mamba(kind: str = "Mamba") -> nn.Module:
    sizes = {"vocab_size": 64, "hidden_size": 16, "num_hidden_layers": 1, "state_size": 4, "time_step_rank": 2}
    return getattr(T, f"{kind}ForCausalLM")(getattr(T, f"{kind}Config")(**sizes))


def bart() -> nn.Module:
    sides = {f"{side}_{what}": 1 for side in ("encoder", "decoder") for what in ("layers", "attention_heads")}
    ffn = {"encoder_ffn_dim": 16, "decoder_ffn_dim": 16}
    return T.BartForConditionalGeneration(T.BartConfig(vocab_size=32, d_model=16, **sides, **ffn))


UNCALLED: dict[str, tuple[Callable[[], nn.Module], list[str]]] = {
    "wavlm": (lambda: T.WavLMModel(T.WavLMConfig(**SMALL, **CONVS, **SPEECH)), ["q_proj", "k_proj", "v_proj", "out_proj"]),
    "x-vector": (lambda: T.Wav2Vec2ForXVector(T.Wav2Vec2Config(**SMALL, **CONVS, **SPEECH, **XVECTOR)), ["kernel"]),
    "mobilebert": (mobilebert, ["predictions.dense", "predictions.decoder"]),
    "longcat": (longcat, ["classifier"]),
    "gemma3n": (gemma3n, ["correction_coefs", "prediction_coefs"]),
    "mamba": (mamba, ["dt_proj", "x_proj", "out_proj", "conv1d"]),
    "falcon_mamba": (lambda: mamba("FalconMamba"), ["dt_proj", "x_proj", "out_proj", "conv1d"]),
    "multi-head attention": (lambda: nn.Sequential(nn.MultiheadAttention(8, 2)), ["0.out_proj"]),
    "t5": (MODELS["t5"], ["shared"]),
    "bart": (bart, ["shared"]),
}  # fmt: skip


@pytest.mark.parametrize("name", UNCALLED)
def test_what_nothing_calls_gets_no_adapter_and_no_copy(name):
    make, uncalled = UNCALLED[name]
    for target in uncalled:
        model = make()
        before = [n for n, _ in model.named_parameters()]
        for fields in ({"target_modules": [target]}, {"target_modules": "all-linear", "modules_to_save": [target]}):
            with pytest.raises(InputError, match=r"would act|no adapter fits|matches nothing"):
                lowrank.wrap(model, LoraConfig(**fields))
        assert [n for n, _ in model.named_parameters()] == before


@pytest.mark.parametrize("name", ["mobilebert", "gemma3n", "mamba"])
def test_all_linear_leaves_them_out_and_says_so(name):
    model = lowrank.wrap(UNCALLED[name][0](), LoraConfig(r=2))
    info = lowrank.describe(model)["default"]
    linear = [target for target in UNCALLED[name][1] if target not in ("conv1d", "predictions.decoder")]
    for target in linear:
        left = [path for path in info.left_out if path.endswith(target)]
        assert left, (target, info.left_out)
        assert not set(left) & set(info.modules)
        assert all("reads its weight" in info.left_out[path] for path in left)
    model.eval()(IDS)[0].square().sum().backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


def test_bloom_reads_weights_only_for_a_setting_that_it_does_not_have():
    """A branch that the config decides against does not count."""
    config = {"vocab_size": 64, "hidden_size": 16, "n_layer": 1, "n_head": 2}
    lowrank.wrap(T.BloomForCausalLM(T.BloomConfig(**config)), LoraConfig(target_modules=["dense"]))
    sliced = T.BloomForCausalLM(T.BloomConfig(**config, pretraining_tp=2, slow_but_exact=True))
    with pytest.raises(InputError, match="BloomAttention reads its weight"):
        lowrank.wrap(sliced, LoraConfig(target_modules=["dense"]))


class Reader(nn.Module):
    """Three layers of which a way of its own is used for the second; the first is called."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(self.a(x))

    def second(self, x: torch.Tensor) -> torch.Tensor:
        raise NotImplementedError


def apply_linear(layer: nn.Linear, x: torch.Tensor) -> torch.Tensor:
    weight = layer.weight
    return x @ weight.t()


class Locals(Reader):
    def second(self, x):
        layer = self.b
        weight, bias = layer.weight, layer.bias
        return F.linear(x, weight, bias)


class Handed(Reader):
    def second(self, x):
        return apply_linear(self.b, x)


class ByName(Reader):
    def second(self, x):
        return x @ getattr(self, "b").weight  # noqa: B009


class ByAnyName(Reader):
    def second(self, x):
        for name in ("b",):
            x = F.linear(x, getattr(self, name).weight)
        return x


class InAFunction(Reader):
    def second(self, x):
        def inner(y):
            return F.linear(y, self.b.weight)

        return inner(x)


class AProperty(Reader):
    @property
    def matrix(self):
        return self.b.weight

    def second(self, x):
        return x @ self.matrix


class Collected(Reader):
    def second(self, x):
        weights = [layer.weight for layer in (self.b,)]
        return x @ torch.cat(weights)


class Inherited(Locals):
    def second(self, x):
        return super().second(x).relu()


class OnlyTheBias(Reader):
    def second(self, x):
        return x + self.b.bias


class Called(Reader):
    def second(self, x):
        assert self.b.weight is not None
        return self.b(x.to(self.b.weight.dtype)) + torch.zeros_like(self.b.weight).sum()


class CalledInAFunction(Reader):
    def second(self, x):
        return torch.utils.checkpoint.checkpoint(lambda y: self.b(y), x, use_reentrant=False)


class CalledByName(Reader):
    def second(self, x):
        for name in "b":
            x = getattr(self, name)(x)
        return x


@pytest.mark.parametrize(
    "kind", [Locals, Handed, ByName, ByAnyName, InAFunction, AProperty, Collected, Inherited, OnlyTheBias]
)
def test_a_weight_is_found_however_it_is_read(kind):
    for fields in ({"target_modules": ["b"]}, {"target_modules": ["a"], "modules_to_save": ["b"]}):
        with pytest.raises(InputError, match=f"{kind.__name__} reads"):
            lowrank.wrap(kind(), LoraConfig(**fields))
    if kind is not ByAnyName:  # which of its layers it reads is not written down: none is taken
        assert lowrank.describe(lowrank.wrap(kind(), LoraConfig()))["default"].modules == ("a",)


@pytest.mark.parametrize("kind", [Called, CalledInAFunction, CalledByName])
def test_what_is_called_is_not_refused(kind):
    model = lowrank.wrap(kind(), LoraConfig(init_lora_weights=False))
    assert lowrank.describe(model)["default"].modules == ("a", "b")
    model(torch.randn(2, 4)).sum().backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


def test_biases_that_are_read_past_their_module():
    with pytest.raises(InputError, match=r"cannot train b\.bias: OnlyTheBias reads its bias"):
        lowrank.wrap(OnlyTheBias(), LoraConfig(target_modules=["a"], bias="all"))


class Experts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Parameter(torch.randn(2, 4, 4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.einsum("bi,eoi->bo", x, self.up)


class Around(nn.Module):
    def __init__(self, reads: bool) -> None:
        super().__init__()
        self.experts, self.reads = Experts(), reads

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.einsum("bi,eoi->bo", x, self.experts.up) if self.reads else self.experts(x)


def test_parameters_that_are_read_past_their_module():
    config = LoraConfig(target_modules=[], target_parameters=["experts.up"])
    with pytest.raises(InputError, match="Around reads its up"):
        lowrank.wrap(Around(reads=True), config)
    lowrank.wrap(Around(reads=False), config)


class Holders(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.layers = nn.Linear(4, 4), nn.ModuleList([nn.Linear(4, 4)])
        self.table, self.block = nn.ParameterDict({"w": torch.randn(4, 4)}), nn.Sequential(nn.Linear(4, 4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.block[0](self.layers[0](self.a(x)) @ self.table["w"])


@pytest.mark.parametrize("name", ["layers", "table", "block"])
def test_holders_are_not_called_as_a_whole(name):
    with pytest.raises(InputError, match="a copy of"):
        lowrank.wrap(Holders(), LoraConfig(target_modules=["a"], modules_to_save=[name]))
    lowrank.wrap(Holders(), LoraConfig(target_modules=["a"], modules_to_save=["layers.0"]))


@pytest.mark.parametrize("make", [Locals, mamba])
def test_a_copy_of_the_reader_itself_is_right(make):
    """What reads a weight inside of the copy reads the copy's."""
    model = make()
    name = "mixer" if make is mamba else "inner"
    if make is not mamba:
        model = nn.Sequential()
        model.add_module("inner", Locals())
        model.add_module("last", nn.Linear(4, 4))
    lowrank.wrap(model, LoraConfig(target_modules=["last" if name == "inner" else "lm_head"], modules_to_save=[name]))
    out = model(IDS).logits if make is mamba else model(torch.randn(2, 4))
    out.square().sum().backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


@pytest.mark.parametrize("target", ["linear1", "linear2", "norm1"])
def test_torchs_encoder_layer_is_right_in_both_modes(target):
    """In evaluation it would hand its weights to one kernel; with an adapter it calls its parts."""
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True)
    model = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
    x = torch.randn(2, 5, 16)
    base = model.eval()(x)
    fields = (
        {"modules_to_save": ["1.norm1"], "target_modules": ["linear1"]}
        if target == "norm1"
        else {"target_modules": [target]}
    )
    lowrank.wrap(model, LoraConfig(**fields, init_lora_weights=False))
    with torch.no_grad():
        trained, evaluated = model.train()(x), model.eval()(x)
    torch.testing.assert_close(evaluated, trained, atol=1e-6, rtol=1e-5)
    assert (evaluated - base).abs().max() > 1e-2
    lowrank.unwrap(model)
    assert torch.equal(model.eval()(x), base)


def test_the_table_that_lends_its_weight_to_both_sides():
    with pytest.raises(InputError, match=r"shared would act on nothing: nothing calls it; encoder\.embed_tokens holds"):
        lowrank.wrap(MODELS["t5"](), LoraConfig(target_modules=["shared"]))
    model = lowrank.wrap(MODELS["t5"](), LoraConfig(target_modules=["embed_tokens"]))
    assert len(lowrank.describe(model)["default"].modules) == 2
