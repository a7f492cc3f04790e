"""A script of the Python API as a user starts it: `api_script.py OUTPUT MODEL [JSON]` trains on drawn images.

JSON has the settings; of them `resume`, `lora_dropout` (an adapter is trained where it is given) and `kill` (a step,
in which the process ends itself by SIGKILL) are the script's own."""

from __future__ import annotations

import json
import os
import signal
import sys
from typing import Any

from peft import LoraConfig
from transformers import TrainerState

from tests.helpers.api import rows, sums
from vlmr1 import GRPOConfig, GRPOTrainer

output, model = sys.argv[1:3]
given: dict[str, Any] = json.loads(sys.argv[3]) if len(sys.argv) > 3 else {}
resume, kill, dropout = (given.pop(name, None) for name in ("resume", "kill", "lora_dropout"))


def reward(completion_ids: list[list[int]], trainer_state: TrainerState, **_: Any) -> list[float]:
    if trainer_state.global_step == kill:
        os.kill(os.getpid(), signal.SIGKILL)
    return sums(completion_ids)


settings: dict[str, Any] = dict(use_cpu=True, bf16=False, report_to="none", logging_steps=1, learning_rate=1e-2)
settings |= dict(num_generations=2, per_device_train_batch_size=4, max_completion_length=6, disable_tqdm=True)
adapter = None
if dropout is not None:
    adapter = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], lora_dropout=dropout, task_type="CAUSAL_LM")
args = GRPOConfig(output, **settings | given)
trainer = GRPOTrainer(model, reward, args, rows(), peft_config=adapter)
trainer.train(resume_from_checkpoint=resume)
trainer.save_model(f"{output}/final")
