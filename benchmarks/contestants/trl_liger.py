"""TRL's SFTTrainer with peft, packing and Liger's kernels; needs a CUDA device and `liger-kernel`."""

from __future__ import annotations

import torch
from job import read_job
from trl_sft import LIBRARIES, adapter_of, train
from watch import base_of


def main() -> None:
    job = read_job()
    torch.manual_seed(job.seed)
    train(job, base_of(job), adapter_of(job), (*LIBRARIES, "liger-kernel"), use_liger_kernel=True)


if __name__ == "__main__":
    main()
