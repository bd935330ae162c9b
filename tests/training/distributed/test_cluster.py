"""How a process finds out that it is one of several."""

import pytest

from mora_jax.errors import InputError
from mora_jax.training.distributed.processes import Cluster, find_cluster, read_flags

SLURM = {
    "SLURM_JOB_ID": "7",
    "SLURM_STEP_NODELIST": "node[3-4]",
    "SLURM_NTASKS": "2",
    "SLURM_PROCID": "1",
    "SLURM_LOCALID": "0",
    "SLURM_STEP_TASKS_PER_NODE": "1(x2)",
}
OPEN_MPI = {
    "OMPI_COMM_WORLD_SIZE": "4",
    "OMPI_COMM_WORLD_RANK": "3",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "2",
    "OMPI_COMM_WORLD_LOCAL_RANK": "1",
    "OMPI_MCA_orte_hnp_uri": "1531576320.0;tcp://10.96.0.1,10.148.0.1:34911",
}
TPU = {"JAX_PLATFORMS": ""}


@pytest.mark.parametrize(
    ("environ", "expected"),
    [
        ({}, None),
        (SLURM, Cluster("SLURM")),
        (SLURM | {"SLURM_NTASKS": "1"}, None),
        # A shell that salloc or sbatch opened is no step: nobody started other processes.
        ({name: value for name, value in SLURM.items() if "STEP" not in name}, None),
        (SLURM | {"SLURM_STEP_TASKS_PER_NODE": "8(x2)", "SLURM_LOCALID": "5"}, Cluster("SLURM", devices=(5,))),
        (
            SLURM | {"SLURM_STEP_TASKS_PER_NODE": "8", "SLURM_LOCALID": "5", "CUDA_VISIBLE_DEVICES": "5"},
            Cluster("SLURM"),
        ),
        (OPEN_MPI, Cluster("Open MPI", devices=(1,))),
        (OPEN_MPI | {"OMPI_COMM_WORLD_LOCAL_SIZE": "1", "OMPI_COMM_WORLD_LOCAL_RANK": "0"}, Cluster("Open MPI")),
        (OPEN_MPI | {"OMPI_COMM_WORLD_SIZE": "1"}, None),
        ({"TPU_WORKER_HOSTNAMES": "a,b", "TPU_WORKER_ID": "0"}, Cluster("TPU")),
        ({"TPU_WORKER_HOSTNAMES": "localhost"}, None),
        ({"TPU_WORKER_HOSTNAMES": "localhost", "MEGASCALE_NUM_SLICES": "2"}, Cluster("TPU")),
        ({"TPU_WORKER_HOSTNAMES": "a,b", "JAX_PLATFORMS": "cpu"}, None),
    ],
)
def test_environments(environ, expected):
    assert find_cluster(environ) == expected


@pytest.mark.parametrize(
    ("attributes", "expected"),
    [
        ({}, None),
        ({"worker-network-endpoints": "10.0.0.2"}, None),
        ({"worker-network-endpoints": "unknown:0:10.0.0.2,unknown:1:10.0.0.3"}, Cluster("TPU")),
        ({"worker-network-endpoints": "h", "tpu-env": "ZONE: 'z'\nMEGASCALE_NUM_SLICES: '2'\n"}, Cluster("TPU")),
    ],
)
def test_metadata_of_a_tpu_vm(attributes, expected):
    assert find_cluster({}, attributes.get) == expected


def test_open_mpi_5_needs_an_address():
    environ = {name: value for name, value in OPEN_MPI.items() if "orte" not in name}
    with pytest.raises(InputError, match="Open MPI 5 doesn't tell .*: add --coordinator HOST:PORT"):
        find_cluster(environ)
    found = read_flags("node0:1234", None, None, environ)
    assert found == Cluster("Open MPI", "node0:1234", 3, 4, (1,))


def test_flags():
    assert read_flags(None, None, None, {}) is None
    assert read_flags("node0:1234", 1, 2, {}) == Cluster("the command line", "node0:1234", 1, 2)
    assert read_flags("[fe80::1]:1234", 0, 2, {}) == Cluster("the command line", "[fe80::1]:1234", 0, 2)
    assert read_flags("node0:1234", 0, 1, {}) is None


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ((None, 0, None), "--process-id needs --coordinator HOST:PORT"),
        ((None, None, 2), "--process-count needs --coordinator HOST:PORT"),
        (("node0", 0, 2), "--coordinator node0: give the host of process 0 and a free port"),
        (("node0:99999", 0, 2), "a free port"),
        (("node0:1234", 0, None), "--coordinator needs --process-id"),
        (("node0:1234", 2, 2), "--process-id 2 must be between 0 and 1"),
    ],
)
def test_flags_that_make_no_sense(flags, words):
    with pytest.raises(InputError, match=words):
        read_flags(*flags, {})
