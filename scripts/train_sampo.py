# /// script
# requires-python = ">=3.11"
# dependencies = [
#     "sampo-dpo",
#     "trackio",
# ]
#
# [tool.uv.sources]
# sampo-dpo = { path = ".." }  # this checkout: the package is not on PyPI yet, remove the line after the release
# ///

"""What `accelerate launch` starts; `sampo train` is the same. Options, data and saving: `sampo/commands/train.py`.

`uv run scripts/train_sampo.py …` installs what it needs from this checkout; `pip install .` does so for `accelerate`.

# Full training
```bash
accelerate launch --config_file configs/accelerate/zero2.yaml scripts/train_sampo.py \
    --dataset_name trl-lib/ultrafeedback_binarized \
    --model_name_or_path Qwen/Qwen2.5-0.5B-Instruct \
    --token_weighting sampo \
    --learning_rate 5.0e-7 \
    --num_train_epochs 1 \
    --per_device_train_batch_size 2 \
    --gradient_accumulation_steps 8 \
    --eval_strategy steps \
    --eval_steps 50 \
    --output_dir runs/qwen2.5-0.5b-sampo
```

# LoRA:
```bash
accelerate launch --config_file configs/accelerate/single_gpu.yaml scripts/train_sampo.py \
    --dataset_name trl-lib/ultrafeedback_binarized \
    --model_name_or_path Qwen/Qwen2.5-0.5B-Instruct \
    --token_weighting sampo \
    --learning_rate 5.0e-6 \
    --num_train_epochs 1 \
    --per_device_train_batch_size 2 \
    --gradient_accumulation_steps 8 \
    --eval_strategy steps \
    --eval_steps 50 \
    --output_dir runs/qwen2.5-0.5b-sampo-lora \
    --use_peft \
    --lora_r 32 \
    --lora_alpha 16
```

# From a recipe, with a change
```bash
accelerate launch --config_file configs/accelerate/single_gpu.yaml scripts/train_sampo.py \
    --config recipes/smollm2-135m-instruct/sampo_lora.yaml --max_steps 20
```
"""

import sys

from sampo.commands.train import start

if __name__ == "__main__":
    sys.exit(start())
