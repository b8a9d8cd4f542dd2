"""The quickstart from Python: train, look at the adapter, merge it.

python examples/finetune_in_python.py BASE TRAIN.jsonl OUT [STEPS]
python examples/finetune_in_python.py .cache/models/smollm2-135m-instruct examples/data/toolcalls_train.jsonl out 20
"""

import sys

import lowrank
from lowrank.config import RunConfig
from lowrank.models import load_model

base, rows, out, steps = sys.argv[1], sys.argv[2], sys.argv[3], int((sys.argv[4:] or ["20"])[0])

run = {
    "model": {"name_or_path": base},
    "adapter": {"r": 16, "lora_alpha": 32, "target_modules": "all-linear"},
    "data": {"train": rows},
    "training": {"output_dir": f"{out}/run", "learning_rate": 1e-3, "max_steps": steps},
}
result = lowrank.train(RunConfig.model_validate(run))

model = load_model(base)
lowrank.load(model, result.output_dir)  # the same object, the same class; `generate` works as ever
print(lowrank.describe(model))
lowrank.save(model, f"{out}/adapter")  # what peft, transformers and vLLM read too
lowrank.unwrap(model)  # the base again, bit for bit

lowrank.wrap(model, lowrank.LoraConfig(r=4), adapter="fresh")  # for a training loop of your own
lowrank.load(model, f"{out}/adapter", adapter="trained")  # adapters of all kinds side by side
lowrank.merge(model, "trained").save_pretrained(f"{out}/merged")  # a plain model
