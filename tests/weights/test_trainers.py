"""Under transformers' and TRL's trainers: what they save, resume and load again is the adapter, and peft's equal."""

from __future__ import annotations

import peft
import pytest
import torch
from datasets import Dataset
from safetensors.torch import load_file
from tiny import tiny_llama, tiny_tokenizer
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, Trainer, TrainerCallback, TrainingArguments
from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer

import lowrank
from lowrank.errors import InputError

STEPS = 6
CONFIG = lowrank.LoraConfig(r=4, lora_alpha=8, target_modules="all-linear")
TEXTS = [f"say {i} and then {i + 1} again" for i in range(12)]


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base")
    tiny_llama().save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def wrapped(base):
    torch.manual_seed(1)
    return lowrank.wrap(AutoModelForCausalLM.from_pretrained(base), CONFIG)


def arguments(out, **more) -> dict:
    return {
        "output_dir": str(out),
        "max_steps": STEPS,
        "save_steps": 2,
        "per_device_train_batch_size": 2,
        "learning_rate": 1e-2,
        "report_to": [],
        "use_cpu": True,
        "bf16": False,
        "disable_tqdm": True,
        **more,
    }


def plain(model, out, **more) -> Trainer:
    rows = [{"input_ids": ids, "labels": ids} for ids in (tiny_tokenizer()(text)["input_ids"][:10] for text in TEXTS)]
    return Trainer(model, TrainingArguments(**arguments(out, **more)), train_dataset=rows, eval_dataset=rows[:2])


def sft(model, out, **more) -> SFTTrainer:
    rows = Dataset.from_list([{"text": text} for text in TEXTS])
    config = SFTConfig(**arguments(out, **more), max_length=32)
    return SFTTrainer(model, config, train_dataset=rows, eval_dataset=rows, processing_class=tiny_tokenizer())


def dpo(model, out, **more) -> DPOTrainer:
    rows = Dataset.from_list([{"prompt": text, "chosen": " yes", "rejected": " no"} for text in TEXTS])
    config = DPOConfig(**arguments(out, **more), max_length=32)
    return DPOTrainer(model, None, config, train_dataset=rows, eval_dataset=rows, processing_class=tiny_tokenizer())


class Killed(TrainerCallback):
    def on_step_end(self, args, state, control, **_):
        if state.global_step == 3:
            raise KeyboardInterrupt


def tensors(folder) -> dict[str, torch.Tensor]:
    return load_file(folder / "adapter_model.safetensors")


@pytest.mark.parametrize("trainer", [plain, sft, dpo])
def test_killed_and_resumed_is_uninterrupted_and_equals_peft(trainer, base, tmp_path):
    uninterrupted = trainer(wrapped(base), tmp_path / "one")
    uninterrupted.train()
    uninterrupted.save_model(str(tmp_path / "saved"))

    killed = trainer(wrapped(base), tmp_path / "two")
    killed.add_callback(Killed())
    with pytest.raises(KeyboardInterrupt):
        killed.train()
    resumed = trainer(wrapped(base), tmp_path / "two")
    resumed.train(resume_from_checkpoint=True)
    torch.testing.assert_close(tensors(tmp_path / "two/checkpoint-6"), tensors(tmp_path / "saved"), rtol=0, atol=0)

    lowrank.save(wrapped(base), tmp_path / "start")
    theirs = AutoModelForCausalLM.from_pretrained(base)
    theirs = peft.PeftModel.from_pretrained(theirs, tmp_path / "start", is_trainable=True)
    beside = trainer(theirs, tmp_path / "peft")
    beside.train()
    beside.save_model(str(tmp_path / "peft-saved"))
    torch.testing.assert_close(tensors(tmp_path / "saved"), tensors(tmp_path / "peft-saved"), rtol=1e-4, atol=1e-6)


def test_the_best_model_is_loaded_at_the_end(base, tmp_path):
    trainer = plain(
        wrapped(base),
        tmp_path,
        eval_strategy="steps",
        eval_steps=2,
        load_best_model_at_end=True,
        metric_for_best_model="eval_loss",
        greater_is_better=True,
    )
    trainer.train()
    assert trainer.state.best_model_checkpoint.endswith("checkpoint-2")
    trainer.save_model(str(tmp_path / "best"))
    torch.testing.assert_close(tensors(tmp_path / "best"), tensors(tmp_path / "checkpoint-2"), rtol=0, atol=0)


def test_what_is_saved_answers_in_peft_and_transformers(base, tmp_path):
    model = wrapped(base)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_()
    model.save_pretrained(tmp_path / "saved")
    ids = torch.arange(3, 12)[None]
    expected = model.eval()(ids).logits
    for again in (
        peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), tmp_path / "saved"),
        AutoModelForCausalLM.from_pretrained(tmp_path / "saved"),
        lowrank.load(AutoModelForCausalLM.from_pretrained(base), tmp_path / "saved"),
    ):
        torch.testing.assert_close(again.eval()(ids).logits, expected)


def test_a_base_in_four_bits_trains_and_saves_its_adapter(base, tmp_path):
    bits = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32)
    model = AutoModelForCausalLM.from_pretrained(base, quantization_config=bits)
    trainer = plain(lowrank.wrap(model, CONFIG), tmp_path)
    trainer.train()
    assert all(tensor.any() for name, tensor in tensors(tmp_path / "checkpoint-6").items() if "lora_B" in name)


def test_several_adapters_stand_where_peft_has_them(base, tmp_path):
    model = lowrank.wrap(wrapped(base), CONFIG, "other")
    model.save_pretrained(tmp_path)
    assert (tmp_path / "adapter_model.safetensors").exists()
    assert (tmp_path / "other/adapter_model.safetensors").exists()
    again = lowrank.wrap(wrapped(base), CONFIG, "other")
    result = again.load_state_dict(load_file(tmp_path / "model.safetensors"), strict=False)
    assert not result.missing_keys
    torch.testing.assert_close(again.state_dict(), model.state_dict(), rtol=0, atol=0)
    with pytest.raises(InputError, match="only some of the model's adapters"):
        again.load_state_dict({"model.layers.0.mlp.up_proj.adapters.other.lora_A": torch.zeros(4, 4)})


def test_a_base_of_no_place_is_kept_beside_its_adapter(tmp_path):
    model = lowrank.wrap(tiny_llama(), lowrank.LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False))
    model.save_pretrained(tmp_path)
    ids = torch.arange(3, 12)[None]
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    torch.testing.assert_close(again(ids).logits, model(ids).logits)
    assert model.config._name_or_path == ""
    resumed = lowrank.wrap(tiny_llama(), lowrank.LoraConfig(r=4, target_modules="all-linear"))
    resumed.load_state_dict(load_file(tmp_path / "model.safetensors"), strict=False)
    torch.testing.assert_close(resumed(ids).logits, model(ids).logits)


def test_a_merged_or_unwrapped_model_saves_itself_again(base, tmp_path):
    for end in (lowrank.merge, lowrank.unwrap):
        folder = tmp_path / end.__name__
        model = end(wrapped(base))
        model.save_pretrained(folder)
        assert (folder / "config.json").exists()
        assert not (folder / "adapter_config.json").exists()


def test_what_would_be_ignored_is_refused(base, tmp_path):
    model = wrapped(base)
    with pytest.raises(InputError, match="variant"):
        model.save_pretrained(tmp_path, variant="fp16")
    other = {name: value + 1 for name, value in model.state_dict().items() if "lora_A" in name}
    with pytest.raises(InputError, match="another"):
        model.save_pretrained(tmp_path, state_dict=other)
    assert not list(tmp_path.iterdir())
