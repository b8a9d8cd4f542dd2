"""Preferences against TRL: a whole run of each objective gives the adapter that TRL's trainer gives, to 1e-5."""

from __future__ import annotations

import json

import datasets
import peft
import pytest
import torch
import transformers
import yaml
from safetensors.torch import load_file
from tiny import tiny_llama, tiny_tokenizer
from trl import DPOConfig, DPOTrainer, KTOConfig, KTOTrainer
from trl.experimental.cpo import CPOConfig, CPOTrainer
from trl.experimental.orpo import ORPOConfig, ORPOTrainer

import lowrank
from lowrank.training.callbacks.metrics_file import read_metrics

STEPS = 3
SAID = [" yes, it is", " no", " perhaps, who knows", " it is late", " 42", " a longer answer than the others"]
PAIRS = [
    {"prompt": f"Question {i}:{' please' * (i % 3)}", "chosen": SAID[i], "rejected": SAID[(i * 5 + 2) % 6]}
    for i in range(6)
    if SAID[i] != SAID[(i * 5 + 2) % 6]
]
RATED = [{"prompt": f"Question {i}:", "completion": SAID[i], "label": i % 3 > 0} for i in range(6)]

CASES = {
    "dpo": (DPOTrainer, DPOConfig, {"beta": 0.5}),
    "dpo-hinge": (DPOTrainer, DPOConfig, {"beta": 0.5, "loss_type": "hinge"}),
    "dpo-robust": (DPOTrainer, DPOConfig, {"beta": 0.5, "loss_type": "robust", "label_smoothing": 0.1}),
    "dpo-apo_zero": (DPOTrainer, DPOConfig, {"beta": 0.5, "loss_type": "apo_zero"}),
    "dpo-apo_down": (DPOTrainer, DPOConfig, {"beta": 0.5, "loss_type": "apo_down"}),
    "ipo": (DPOTrainer, DPOConfig, {"beta": 0.2}),
    "simpo": (CPOTrainer, CPOConfig, {"beta": 2.0, "simpo_gamma": 0.7}),
    "cpo": (CPOTrainer, CPOConfig, {"beta": 0.1, "label_smoothing": 0.1}),
    "cpo-hinge": (CPOTrainer, CPOConfig, {"beta": 0.1, "loss_type": "hinge", "cpo_alpha": 0.5}),
    "orpo": (ORPOTrainer, ORPOConfig, {"beta": 0.3}),
    "kto": (KTOTrainer, KTOConfig, {"beta": 0.5, "desirable_weight": 1.5}),
    "kto-apo_zero_unpaired": (KTOTrainer, KTOConfig, {"beta": 0.5, "loss_type": "apo_zero_unpaired"}),
}


@pytest.fixture(scope="module")
def begun(tmp_path_factory):
    """A base, and an adapter on it that does something already."""
    folder = tmp_path_factory.mktemp("begun")
    model, tokenizer = tiny_llama(), tiny_tokenizer(None)
    tokenizer.bos_token = None  # TRL would write one before a prompt, whatever the tokenizer does
    model.save_pretrained(folder / "base")
    tokenizer.save_pretrained(folder / "base")
    torch.manual_seed(1)
    lowrank.wrap(model, lowrank.LoraConfig(r=4, lora_alpha=8))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.05)
    lowrank.save(model, folder / "adapter")
    return folder


@pytest.mark.parametrize("case", CASES)
def test_a_whole_run_is_trls(begun, tmp_path, monkeypatch, case):
    monkeypatch.chdir(tmp_path)
    objective = case.partition("-")[0]
    rows = RATED if objective == "kto" else PAIRS
    _, _, numbers = CASES[case]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    reference = {"reference": "base"} if objective in ("dpo", "ipo", "kto") else {}
    config = {
        "model": {"name_or_path": str(begun / "base"), "adapter": str(begun / "adapter")},
        "data": {"train": "rows.jsonl", "max_length": 64},
        "training": {
            "output_dir": "out",
            "objective": objective,
            "tokens_per_batch": 512,
            "max_steps": STEPS,
            "learning_rate": 1e-3,
            "adam_epsilon": 1e-4,
            "lr_scheduler_type": "constant",
            "warmup_ratio": 0.0,
            **reference,
            **numbers,
        },
    }
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(config))
    lowrank.train(tmp_path / "run.yaml")
    theirs, losses = _trained_by_trl(begun, case, rows)
    ours = load_file("out/adapter_model.safetensors")
    assert ours.keys() == theirs.keys()
    begun_with = load_file(begun / "adapter" / "adapter_model.safetensors")
    assert max((ours[name] - begun_with[name]).abs().max() for name in ours) > 5e-4
    for name, tensor in ours.items():
        torch.testing.assert_close(
            tensor, theirs[name], atol=1e-5, rtol=1e-5, msg=lambda told, name=name: f"{name}: {told}"
        )
    steps = [line["loss"] for line in read_metrics(tmp_path / "out" / "metrics.jsonl") if line["kind"] == "step"]
    assert steps == pytest.approx(losses, abs=1e-5)


def _trained_by_trl(begun, case, rows):
    """The adapter that TRL makes of the same rows, and the losses of its steps."""
    trainer_class, config_class, numbers = CASES[case]
    renamed = {"ipo": {"loss_type": "ipo"}, "simpo": {"loss_type": "simpo", "cpo_alpha": 0.0}}.get(case, {})
    model = transformers.AutoModelForCausalLM.from_pretrained(begun / "base", attn_implementation="eager")
    frozen = transformers.AutoModelForCausalLM.from_pretrained(begun / "base", attn_implementation="eager")
    model = peft.PeftModel.from_pretrained(model, str(begun / "adapter"), is_trainable=True)
    args = config_class(
        output_dir="theirs",
        per_device_train_batch_size=len(rows),
        max_steps=STEPS,
        learning_rate=1e-3,
        adam_epsilon=1e-4,
        lr_scheduler_type="constant",
        optim="adamw_torch",
        max_length=64,
        bf16=False,
        gradient_checkpointing=False,
        logging_steps=1,
        report_to="none",
        use_cpu=True,
        save_strategy="no",
        disable_tqdm=True,
        **{**numbers, **renamed},
    )
    held = {"ref_model": frozen} if trainer_class in (DPOTrainer, KTOTrainer) else {}
    data = datasets.Dataset.from_list(rows)
    tokenizer = transformers.AutoTokenizer.from_pretrained(begun / "base")
    trainer = trainer_class(model=model, args=args, train_dataset=data, processing_class=tokenizer, **held)
    trainer.train()
    trainer.model.save_pretrained("theirs")
    losses = [line["loss"] for line in trainer.state.log_history if "loss" in line]
    return load_file("theirs/adapter_model.safetensors"), losses
