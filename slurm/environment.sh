# shellcheck shell=bash
# The environment of every rank: sourced by the Slurm scripts, the launchers and the container's entry point. A value
# that is already set stays; each line says why it is here.

# one hardware queue: kernels of tensor-parallel communication start in the order Megatron issues them, so they overlap
export CUDA_DEVICE_MAX_CONNECTIONS=${CUDA_DEVICE_MAX_CONNECTIONS:-1}
# prompts and images have many lengths: blocks of fixed size would fragment until free memory cannot be used
export PYTORCH_CUDA_ALLOC_CONF=${PYTORCH_CUDA_ALLOC_CONF:-expandable_segments:True}
# NVLink SHARP keeps buffers for each communicator; this program has many small ones and needs the memory more
export NCCL_NVLS_ENABLE=${NCCL_NVLS_ENABLE:-0}
# InfiniBand waits 4.096 us * 2^22 = 17 s before it gives a packet up: a link that flaps must not end the night's run
export NCCL_IB_TIMEOUT=${NCCL_IB_TIMEOUT:-22}
# warnings only; INFO prints thousands of lines at 64 ranks
export NCCL_DEBUG=${NCCL_DEBUG:-WARN}
# what every rank was doing when a collective hung is written down before the run is ended
export TORCH_FR_BUFFER_SIZE=${TORCH_FR_BUFFER_SIZE:-2000}
export TORCH_NCCL_DUMP_ON_TIMEOUT=${TORCH_NCCL_DUMP_ON_TIMEOUT:-1}
# everything is local: 64 ranks must not ask the hub, nor wait for a network that compute nodes do not have
export HF_HUB_OFFLINE=${HF_HUB_OFFLINE:-1}
# the loader forks after tokenizers were used, and its threads do not survive a fork
export TOKENIZERS_PARALLELISM=${TOKENIZERS_PARALLELISM:-false}
# ranks and loader workers fill the cores; a thread pool in each would only make them wait for each other
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
# caches on the node's own disk: ranks of all nodes would race for a shared home, which a container may not even have
cache=${TMPDIR:-/tmp}/nemo_vopd-$(id -u)
(umask 077 && mkdir -p "$cache" 2>/dev/null) || true
# compiled code is loaded from there: a folder that somebody else made, or may write to, is not used
if [ -L "$cache" ] || [ ! -O "$cache" ] || [ -n "$(find "$cache" -maxdepth 0 -perm /022)" ]; then cache=$(mktemp -d); fi
export XDG_CACHE_HOME=${XDG_CACHE_HOME:-$cache/cache}
export TRITON_CACHE_DIR=${TRITON_CACHE_DIR:-$cache/triton}
export MPLCONFIGDIR=${MPLCONFIGDIR:-$cache/cache/matplotlib}
# lines reach the log when they are printed, also those before a crash, with a traceback of every thread
export PYTHONUNBUFFERED=${PYTHONUNBUFFERED:-1}
export PYTHONFAULTHANDLER=${PYTHONFAULTHANDLER:-1}
