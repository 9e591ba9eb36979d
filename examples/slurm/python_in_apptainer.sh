#!/usr/bin/env bash
# A Python inside an Apptainer container, for the batch scripts:
#
#   export PYTHON=examples/slurm/python_in_apptainer.sh IMAGE=/shared/megatron_sas.sif
#   sbatch examples/slurm/multi_node_srun.sbatch CONFIG.yaml RUN
#
# --nv shows the container the GPUs. Bind every folder that the configuration names; the variables that Slurm and
# common.sh set reach the container by themselves. Under Pyxis no such script is needed, but
#
#   export SRUN_OPTIONS="--container-image=/shared/megatron_sas.sqsh --container-mounts=$PWD,/scratch --container-workdir=$PWD"
#   export PYTHON=python
exec apptainer exec --nv --bind "$PWD${BIND:+,$BIND}" --pwd "$PWD" "${IMAGE:?the container image}" python "$@"
