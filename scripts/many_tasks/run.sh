#!/bin/sh
# The trainings of docs/results/many-tasks.md for one encoder; the same command continues.
#   scripts/many_tasks/run.sh MODEL DATA OUT LEARNING_RATE MAX_LENGTH
set -e
model=$1 data=$2 out=$3
more="--learning-rate $4 --max-length $5 --batch-size 32 --seeds 3 --machine.threads 1"
tune() { # NAME OPTIONS
    name=$1
    shift
    fastbert finetune --model "$model" $more --out "$out/$name" "$@"
}
for task in mrpc stsb snli rte; do
    tune single-$task --task "$data/$task.yaml" --epochs 2
    tune long-$task --task "$data/$task.yaml" --epochs 12
    tune stages-$task --stages "$data/big.yaml,$data/$task.yaml" --epochs 2
    tune pair-$task --task "$data/$task.yaml,$data/big.yaml" --together --target $task --epochs 2
done
small=$data/mrpc.yaml,$data/stsb.yaml,$data/snli.yaml,$data/rte.yaml
tune all --task "$small,$data/big.yaml" --together --epochs 2
tune small --task "$small" --together --epochs 2
fastbert affinity --model "$model" $more --tasks "$small" --groups 2 --train --epochs 1 --out "$out/affinity"
