"""The meaning of log lines: a table, the more specific rule first.

Each rule has a kind of failure, a pattern, a cause and an action. `tier` ranks it as a cause: ROOT explains itself;
ERROR is an exception of the program; SETUP is an error after which a script may have continued; SYMPTOM may be caused
by another process (a timeout, a hang); CASCADE is a cause only if there is no other. In texts, {0}, {1} … are the
groups of the pattern.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from enum import IntEnum
from typing import Literal

Kind = Literal[
    "python_exception", "import_error", "oom_cuda", "oom_host", "nccl_timeout", "network_setup", "port_in_use",
    "gpu_missing", "gpu_fault", "slurm_submit", "environment_missing", "disk_full", "permission", "not_shared",
    "node_failure", "preempted", "time_limit", "mismatch", "nan", "data_error", "hang", "unknown",
]  # fmt: skip


class Tier(IntEnum):
    ROOT = 0
    ERROR = 1
    SETUP = 2
    SYMPTOM = 3
    CASCADE = 4


@dataclass(frozen=True)
class Rule:
    """`final`: a message of the scheduler or the kernel that ended the job; it explains all later lines. A group `rank`
    of the pattern is the rank that the line is about, if it is not the rank that wrote it."""

    kind: Kind
    tier: Tier
    pattern: re.Pattern[str]
    cause: str
    action: str
    confidence: float = 0.9
    final: bool = False


def _rule(
    kind: Kind,
    pattern: str,
    cause: str,
    action: str,
    tier: Tier = Tier.ROOT,
    confidence: float = 0.9,
    final: bool = False,
) -> Rule:
    return Rule(kind, tier, re.compile(pattern, re.IGNORECASE), cause, action, confidence, final)


_SMALLER = (
    "Lower step_scheduler.local_batch_size or data.seq_len, shard over more workers (distributed.strategy: fsdp, tp_size), "
    "or recompute activations (distributed.activation_checkpointing: full). logging.memory_snapshots: true records it."
)
_HOST_SMALLER = (
    "Request more memory (slurm.mem), use fewer data workers or a smaller cache in the program; `sacct -j JOB "
    "-o MaxRSS` shows the peak."
)
_RESERVED = (
    "Another process on the node uses this port: choose another port, or port 0 (torchrun --rdzv-endpoint HOST:0)."
)
_PATHS = "Use a shared file system that all nodes can access, and check the path on the node itself."
_ENVIRONMENT = "Activate the same environment on all nodes (slurm.setup, slurm.modules), and test it: srun -N1 python -c 'import …'."

_LOCAL = r"(?:/tmp|/var/tmp|/dev/shm|/local\w*|/lscratch|/scratch[_/]local|/local_scratch|/nvme\w*|/raid|/mnt/nvme\w*)"
"""Directories that are usually local to a node."""

RULES: tuple[Rule, ...] = (
    # -- ended by Slurm or the kernel
    _rule("time_limit", r"CANCELLED AT (\S+) DUE TO TIME LIMIT|\bState=TIMEOUT\b|Reached time limit|DUE TO JOB TIME ?LIMIT",
          "the job reached its time limit", "Request more time (slurm.time), or continue in another job: raylaunch "
          "saves before the limit and requeues itself.", final=True, confidence=0.97),
    _rule("preempted", r"CANCELLED AT (\S+) DUE TO PREEMPTION|\bState=PREEMPTED\b|job \S+ (?:was |has been )?preempted",
          "the job was preempted", "Submit it with --requeue (raylaunch does), or to a partition or QOS without "
          "preemption.",
          final=True, confidence=0.97),
    _rule("node_failure", r"CANCELLED AT (\S+) DUE TO NODE (?:FAILURE|FAIL)|\bState=NODE_FAIL\b|NODE FAILURE|"
          r"srun: error: Node failure on (\S+)|Job step \S+ aborted: node (\S+) (?:failed|is down)",
          "a node failed", "Exclude the node (slurm.exclude), inform the administrators, and resume from the "
          "last checkpoint.", final=True, confidence=0.95),
    _rule("oom_cuda", r"CUDA out of memory|torch\.(?:cuda\.)?OutOfMemoryError|CUDA error: out of memory|"
          r"CUBLAS_STATUS_ALLOC_FAILED|Cuda failure (?:\d+ )?'out of memory'|hip(?:Error)?OutOfMemory|HIP out of memory",
          "a GPU ran out of memory", _SMALLER, confidence=0.97),
    _rule("oom_host", r"unable to (?:allocate|open|mmap|write|resize) .*shared memory|killed by signal: Bus error|insufficient shared memory",
          "/dev/shm, which data workers use to pass batches, is full", "Enlarge it in the container (--shm-size, "
          "--ipc=host), use fewer data workers, or call torch.multiprocessing.set_sharing_strategy('file_system')."),
    _rule("oom_host", r"oom[-_ ]kill(?:er|ed)?\b|DataLoader worker \(pid[^)]*\) is killed by signal: Killed|Out Of Memory|OUT_OF_MEMORY|Detected (\d+) oom[-_]kill event|"
          r"Killed process (\d+)|exceeded (?:job |step )?memory limit|MemoryError\b|Unable to allocate .* for an array|"
          r"DefaultCPUAllocator: (?:can't|not enough) (?:allocate )?memory|Cannot allocate memory|std::bad_alloc|"
          r"worker (?:was )?killed due to (?:the node running low on )?memory|OutOfMemoryError: Task was killed",
          "a host ran out of memory", _HOST_SMALLER, confidence=0.93),
    # -- GPUs
    _rule("gpu_fault", r"\bXid\b[^\d]*(\d+)|uncorrectable ECC|double bit ECC|CUDA error: (?:uncorrectable|hardware)|"
          r"GPU has fallen off the bus|unspecified launch failure|CUDA error: unknown error|NVLink.*(?:error|fatal)|"
          r"an illegal instruction was encountered|CUDA-capable device\(s\) is/are busy or unavailable",
          "a GPU is faulty", "Exclude the node (slurm.exclude), report this line to the administrators, and resume "
          "from the last checkpoint.", confidence=0.9),
    _rule("gpu_missing", r"no CUDA GPUs are available|No CUDA-capable device|Found no NVIDIA driver|invalid device ordinal|"
          r"CUDA driver version is insufficient|Torch not compiled with CUDA enabled|NVML: Driver/library version mismatch|"
          r"Failed to initialize NVML|torch\.cuda\.is_available\(\) (?:is|returned) False",
          "the program found no usable GPU", "Request GPUs (slurm.gpus_per_node or gres), and check "
          "`srun nvidia-smi` and CUDA_VISIBLE_DEVICES there; the torch build must match the driver."),
    # -- submission
    _rule("slurm_submit", r"(?:sbatch|srun|salloc): error: (?!.*(?:task|node failure|slurmstepd))(.*(?:invalid|not (?:available|"
          r"permitted|allowed|valid)|Unable to allocate|Requested|violat|Batch job submission failed|limit|gres|Memory specification).*)",
          "Slurm refused the request: {0}", "Compare with `sinfo -o '%P %l %G %m'` and `sacctmgr show assoc user=$USER`; "
          "then change slurm.partition, account, qos, time or gpus_per_node.", confidence=0.95),
    _rule("slurm_submit", r"(?:sbatch|salloc): error: (?!.*slurmstepd)(.*)|srun: error: (Only allocated \d+ nodes asked for.*|"
          r"Unable to create step.*)", "Slurm refused the request: {0}{1}", "See `man sbatch` for the option, and "
          "`scontrol show job` for the resources of the job.", confidence=0.8),
    _rule("environment_missing", r"Lmod has detected the following error|ModuleCmd_Load\.c|Unable to locate a modulefile|"
          r"The following module\(s\) are unknown|"
          r"(?:FATAL|ERROR):\s+(?:container|could not open image|Image file|image for)|pyxis: (?:failed|couldn't|error)|"
          r"enroot-\w+.*\[ERROR\]|execve\(\): (\S+): No such file or directory|"
          r"conda: error|EnvironmentNameNotFound|bad interpreter: No such file|GLIBC(?:XX)?_[\d.]+' not found|"
          r"error while loading shared libraries: (\S+)|InvalidCxxCompiler|No working C\+\+ compiler|Failed to find C compiler",
          "a part of the program's environment is missing (module, container, command or library)", _ENVIRONMENT),
    _rule("environment_missing", r"(\S+): command not found|: \d+: (\S+): not found$|/bin/activate: No such file", "a command in the script was not found",
          _ENVIRONMENT, Tier.SETUP),
    # -- storage
    _rule("disk_full", r"No space left on device|Disk quota exceeded|\[Errno (?:28|122)\]|ENOSPC|EDQUOT|"
          r"PytorchStreamWriter failed writing|file write failed|inline_container\.cc.*unexpected pos|iostream error",
          "the storage is full, or its quota is exceeded", "Free space (`raylaunch checkpoints RUN gc`; `lfs quota "
          "-u $USER DIR` shows the quota), or set another checkpoint.checkpoint_dir.", confidence=0.95),
    _rule("permission", r"PermissionError|Permission denied|\[Errno (?:13|1|30)\]|Read-only file system|Operation not permitted",
          "access to a file or device was denied", "Check owner and mode of the path on the node, and whether it is "
          "mounted read-only.",
          confidence=0.85),
    # -- network, set up
    _rule("port_in_use", r"Address already in use|EADDRINUSE|\[Errno 98\]|port (\d+) is (?:already )?in use",
          "a port is in use", _RESERVED, confidence=0.93),
    _rule("network_setup", r"NCCL (?:WARN|error).*(?:No (?:socket )?interface|Bootstrap ?: no socket|no usable|no such device)|"
          r"Bootstrap : no socket interface found|NCCL_SOCKET_IFNAME|ibv_\w+ failed|Call to ibv_\w+ failed|"
          r"unable to (?:find|resolve) (?:address|host)|Name or service not known|Temporary failure in name resolution|"
          r"getaddrinfo|gloo.*(?:no suitable|Unable to resolve|failed to find)|No route to host|Network is unreachable|"
          r"ncclSystemError|ncclInternalError|unhandled system error|"
          r"The (?:client|server) socket has (?:failed to|timed out).*(?:connect|listen|initial)|"
          r"makeDeviceForHostname|Unable to find address for",
          "the processes cannot reach each other over the network", "Set the interface that connects the nodes "
          "(cluster.interface, NCCL_SOCKET_IFNAME, GLOO_SOCKET_IFNAME); NCCL_DEBUG=INFO prints details.", confidence=0.85),
    # -- the program's own
    _rule("import_error", r"\b(ModuleNotFoundError|ImportError): (.*)", "{1}",
          "Install it in the environment that the nodes use. " + _ENVIRONMENT, confidence=0.95),
    _rule("mismatch", r"(size mismatch (?:for|between) .*|Missing key(?:\(s\))? in (?:checkpoint )?state_dict.*|Unexpected key\(s\) in state_dict.*|"
          r"mat1 and mat2 shapes cannot be multiplied.*|shape .* is invalid for input of size.*|"
          r"The size of tensor a .* must match.*|Expected .* to have .* dimension.*|another shape than model.*|do not match the shape of model.*|"
          r"Error\(s\) in loading state_dict.*|need a multiple of \d+ workers.*|another order of samples.*|was written with different data settings.*|"
          r"expected scalar type .* but found .*|index out of range in self|Target \d+ is out of bounds)",
          "shapes do not match: {0}", "Compare the shapes in the checkpoint or the data with the model in the "
          "configuration.", confidence=0.9),
    _rule("nan", r"(?:loss|gradient|grad_norm|norm)\b[^\n]{0,60}\b(?:is|are|became|=|:|was)?\s*(?:nan|inf|non-?finite|not finite)\b|"
          r"FloatingPointError|loss scale already at minimum|Function \S+ returned nan|returned nan values|Nan(?:s)? (?:found|detected)|(?:Found|contains) (?:NaN|inf)",
          "the loss or a gradient is NaN or infinite", "Check the data and the learning rate of the step; "
          "optimizer.on_nonfinite: skip or rollback omits these steps.", confidence=0.88),
    _rule("data_error", r"(UnicodeDecodeError: .*|JSONDecodeError: .*|ArrowInvalid: .*|ParserError: .*|pyarrow\.lib\.\w+: .*|"
          r"DataError: .*|BadZipFile.*|BadGzipFile.*|zlib\.error.*|tarfile\.\w+Error.*|unexpected end of (?:data|file|stream).*|UnpicklingError.*|EOFError: (?:Ran out of input|Compressed file ended).*|PytorchStreamReader failed.*|SafetensorError: .*|"
          r"num_samples should be a positive integer.*|should not be an empty iterable.*|cannot stat .*No such file.*|cannot identify image file.*|"
          r"(?:corrupt(?:ed)?|truncated) (?:file|shard|record|data|image).*|DataLoader worker .*exited unexpectedly.*)",
          "the data cannot be read: {0}", "Check this file; `raylaunch data inspect DIR --verify` compares checksums.",
          confidence=0.85),
    _rule("not_shared", r"(?:FileNotFoundError|No such file or directory|not a local folder|does not exist|chdir to|can't open file)"
          rf".{{0,120}}?({_LOCAL}/[^\s'\"]*)|({_LOCAL}/[^\s'\"]*).{{0,80}}(?:No such file|does not exist|not a local folder)|"
          r"directory is not shared|not (?:on )?(?:a )?shared (?:file ?system|storage)|does not read .* as rank 0 does",
          "a path is not the same on all nodes", _PATHS, confidence=0.8),
    _rule("data_error", r"RunError: (data\.\w+: nothing matches .*)", "{0}", "Set files, directories or globs that exist on "
          "every node, as absolute paths; `raylaunch train --check` detects this without nodes."),
    _rule("data_error", r"FileNotFoundError: (.*)", "a file does not exist: {0}", "Check the path, and that the previous step "
          "wrote the file; on another node, that the directory is shared.", Tier.ERROR, 0.7),
    # -- possibly caused by another process
    _rule("hang", r"no step for (\d+)|hang(?:s|ed)? (?:at|in|on)|the same hang|Watchdog caught collective.*last enqueued|"
          r"blocked for more than \d+ seconds|no progress (?:for|since)|is stuck (?:in|at)|"
          r"(?:ranks?|process(?:es)?) .*(?:did not|has not|have not|never) (?:reach|arrive|respond|join|enter)", "a rank did not reach the next collective", "See its stack "
          "(attempts/N/rank-R.stack.txt, or py-spy dump); ranks that take different branches of the code can cause this.",
          Tier.SYMPTOM, 0.7),
    _rule("nccl_timeout", r"Rank (?P<rank>\d+) failed to pass monitoredBarrier", "rank {0} did not reach a barrier in time",
          "Check what that rank did (its log, py-spy dump); between two barriers, do only work that all ranks share.",
          Tier.SYMPTOM, 0.8),
    _rule("nccl_timeout", r"Watchdog caught collective operation timeout|ProcessGroupNCCL.*(?:timed? ?out|Timeout)|"
          r"NCCL.*(?:timeout|timed out)|collective operation timeout|Timed out waiting \d+ms for (?:recv|send)",
          "a collective timed out", "A rank was late or gone: check the rank that did not time out, and for a slow node; "
          "distributed.comm_timeout sets the timeout.", Tier.SYMPTOM, 0.7),
    _rule("network_setup", r"RendezvousConnectionError|RendezvousTimeoutError|timed out.* waiting for clients|DistStoreError",
          "not all processes joined the rendezvous", "Check that all of them started (see the logs of the missing ones), "
          "and set the interface that connects the nodes (cluster.interface, NCCL_SOCKET_IFNAME, GLOO_SOCKET_IFNAME).",
          Tier.SYMPTOM, 0.7),
    _rule("unknown", r"Segmentation fault", "a process crashed (SIGSEGV)", "Check for an incompatible native library: torch, "
          "CUDA, a compiled extension; `faulthandler` prints the stack.", Tier.SYMPTOM, 0.5),
    # -- a cause only if there is no other
    _rule("unknown", r"Connection (?:reset|closed|refused)|closed by peer|Broken pipe|ECONNRESET|BrokenPipeError|SIGTERM|"
          r"signal 15|exit(?:ed with exit)? code:? ?143|code -15|Signal 15|ChildFailedError|Terminated\b|"
          r"DistNetworkError|DistBackendError|remote process exited|ncclRemoteError|RayActorError|ActorDiedError|WorkerCrashedError|Sending process \d+ closing signal|"
          r"KeyboardInterrupt|STEP .* CANCELLED AT|tcpstore|store->get|recvValue failed",
          "a process was terminated or lost a connection", "Look for an earlier error in the logs of the other ranks.", Tier.CASCADE, 0.3),
)  # fmt: skip

EXITS: dict[int, tuple[Kind, Tier, str, str, float]] = {
    137: ("oom_host", Tier.SYMPTOM, "a process was killed (exit code 137, SIGKILL), usually for lack of memory", _HOST_SMALLER, 0.55),
    139: ("unknown", Tier.ERROR, "a process crashed (exit code 139, SIGSEGV)", "Check for an incompatible native library: "
          "torch, CUDA, a compiled extension; `faulthandler` prints the stack.", 0.5),
    134: ("unknown", Tier.SYMPTOM, "a process aborted (exit code 134, SIGABRT)", "See the log lines before it.", 0.4),
    143: ("unknown", Tier.CASCADE, "a process was terminated (exit code 143, SIGTERM)", "Find out what sent the signal.", 0.3),
}  # fmt: skip
EXIT = re.compile(
    r"(?:exit(?:ed|s|ing)?(?: with)?(?: exit)?[ _]?(?:code|status)?[ :=]+(\d+)|exitcode\s*:? ?(-?\d+)|signal (\d+))",
    re.I,
)
EXCEPTION = re.compile(
    r"^(?:E\s+)?((?:[A-Za-z_]\w*\.)*(?:[A-Z]\w*)?(?:Error|Exception|Exit|Interrupt|Failure|Warning|Timeout|Invalid))(?::\s*(.*))?$"
)
FRAME = re.compile(r'^\s*File "([^"]+)", line (\d+), in (\S+)')

HINTS = (
    "error", "exception", "fail", "cancel", "kill", "state=", "limit", "preempt", "oom", "memory", "alloc", "xid", "ecc",
    "gpu", "cuda", "nccl", "nvml", "nvlink", "nvidia", "hip", "lmod", "modul", "not found", "container", "image", "pyxis",
    "enroot", "execve", "conda", "interpreter", "glibc", "shared", "space", "quota", "errno", "enospc", "edquot", "permission",
    "permitted", "read-only", "address", "eaddr", "port", "socket", "interface", "ibv", "resol", "getaddrinfo", "service",
    "host", "unreachable", "device", "rendezvous", "clients", "mismatch", "missing", "unexpected", "shape", "size of",
    "expected", "multiple of", "order of samples", "data settings", "nan", "inf", "finite", "decode", "corrupt", "truncated", "zip", "pickl",
    "eof", "dataloader", "no such file", "hang", "step for", "blocked", "collective", "timeout", "timed out", "connection",
    "closed", "pipe", "reset", "sig", "exit", "terminated", "process", "store", "recv", "interrupt", "illegal", "does not read",
    "during handling", "stuck", "progress", "reach", "arrive", "overflow", "end of", "chdir", "can't open", "local folder",
    "not exist", "scale already", "direct cause", 'file "', "(local_rank", "segmentation", "compiler", "index out", "out of bounds",
    "num_samples", "empty iterable", "root cause", "cannot stat", "unexpected pos",
)  # fmt: skip
"""No rule matches a line without one of these: most lines of a log are progress, and rules are expensive."""
