#!/bin/sh
# Runs a command on every host of a Cloud TPU slice: launch/tpu_pod.sh NAME ZONE COMMAND...
#
#   launch/tpu_pod.sh my-v5p us-east5-a \
#     .venv/bin/python scripts/train.py --config configs/qwen3_8b.py --workdir /mnt/runs/qwen3_8b \
#     --config.train.micro_batch_size=16
#
# The repository with its environment lies in ~/opsdc_jax on every host, and the workdir in a folder
# that all of them mount (docs/launch.md). Needs gcloud.
set -eu
name=$1 zone=$2
shift 2
exec gcloud compute tpus tpu-vm ssh "$name" --zone "$zone" --worker=all \
  --command "cd opsdc_jax && OPSDC_DISTRIBUTED=1 $*"
