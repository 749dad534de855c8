#!/bin/bash
# A pretrain script in the shape of MindSpeed-LLM's. Three lines are not as they are there: `umask`, SECURERUN_PEERS and
# `securerun` in torchrun's place. Start it on each node, in the directory with pretrain_gpt.py; only NODE_RANK differs.
export CUDA_DEVICE_MAX_CONNECTIONS=1
export PYTORCH_NPU_ALLOC_CONF=expandable_segments:True

NPUS_PER_NODE=8
MASTER_ADDR=10.77.0.1
MASTER_PORT=6000
NNODES=2
NODE_RANK=0
WORLD_SIZE=$((NPUS_PER_NODE * NNODES))

export SECURERUN_PEERS=@hostfile.txt # the nodes of the job, one a line: only these may connect to it
umask 0027                           # securerun's own is as strict; this is for what tee writes

CKPT_SAVE_DIR="your model save ckpt path"
DATA_PATH="your data path"
TOKENIZER_MODEL="your tokenizer path"
CKPT_LOAD_DIR="your model ckpt path"
TP=1
PP=2

DISTRIBUTED_ARGS="
    --nproc_per_node $NPUS_PER_NODE \
    --nnodes $NNODES \
    --node_rank $NODE_RANK \
    --master_addr $MASTER_ADDR \
    --master_port $MASTER_PORT
"

GPT_ARGS="
    --tensor-model-parallel-size ${TP} \
    --pipeline-model-parallel-size ${PP} \
    --use-mcore-models \
    --use-flash-attn \
    --num-layers 32 \
    --hidden-size 4096 \
    --ffn-hidden-size 11008 \
    --num-attention-heads 32 \
    --seq-length 4096 \
    --max-position-embeddings 4096 \
    --micro-batch-size 1 \
    --global-batch-size $((16 * WORLD_SIZE)) \
    --lr 1.25e-6 \
    --train-iters 5000 \
    --bf16
"

DATA_ARGS="
    --data-path $DATA_PATH \
    --tokenizer-model $TOKENIZER_MODEL \
    --split 949,50,1
"

mkdir -p logs
# shellcheck disable=SC2086 # lists of words
securerun $DISTRIBUTED_ARGS pretrain_gpt.py \
    $GPT_ARGS \
    $DATA_ARGS \
    --distributed-backend nccl \
    --load "$CKPT_LOAD_DIR" \
    --save "$CKPT_SAVE_DIR" \
    | tee logs/pretrain_llama2_7b.log
