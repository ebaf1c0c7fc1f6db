# Site settings: a job runs these lines first, on its first host; srun hands the environment to all of them. Edit them for your cluster.
#
# module load cuda/12.8                  # what a login shell would have
# export NCCL_SOCKET_IFNAME=ib0          # the interface that hosts reach each other by
# export NCCL_IB_HCA=mlx5                # InfiniBand adapters
# export GLOO_SOCKET_IFNAME=eth0         # of CPU-only jobs over several hosts
# export TMPDIR=/local/$SLURM_JOB_ID     # a disk of the host's own
export NCCL_DEBUG="${NCCL_DEBUG:-WARN}"
