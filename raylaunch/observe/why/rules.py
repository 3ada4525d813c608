"""What lines of logs mean: a table, the more specific rule first.

Each rule names a kind of failure, a pattern, and what to do about it. `tier` says what it is worth as a cause: ROOT
explains itself; ERROR is an exception of the program; SETUP is what a script may have gone on after; SYMPTOM may be
somebody else's doing (a time-out, a hang); CASCADE is never a cause where there is anything else. In texts, {0}, {1} …
are the pattern's groups.
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
    """`final`: what the scheduler or the kernel says when it ends things: it explains all that comes after. A group
    `rank` of the pattern is whom the line speaks of, if not of its writer."""

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
    "or recompute activations (distributed.activation_checkpointing: full). logging.memory_snapshots: true shows what lay there."
)
_HOST_SMALLER = (
    "Ask for more memory (slurm.mem), use fewer data workers or a smaller cache in the program; `sacct -j JOB -o MaxRSS` "
    "says how much it had."
)
_RESERVED = "Ports in use belong to somebody else on a shared node: use another one, or port 0 (torchrun --rdzv-endpoint HOST:0)."
_PATHS = "Put it where all nodes see it (a shared file system), and check the path on the node itself."
_ENVIRONMENT = "Activate the same environment on all nodes (slurm.setup, slurm.modules), and try it there: srun -N1 python -c 'import …'."

_LOCAL = r"(?:/tmp|/var/tmp|/dev/shm|/local\w*|/lscratch|/scratch[_/]local|/local_scratch|/nvme\w*|/raid|/mnt/nvme\w*)"
"""Where nodes mostly have storage of their own."""

RULES: tuple[Rule, ...] = (
    # -- Slurm and the kernel, who end things themselves
    _rule("time_limit", r"CANCELLED AT (\S+) DUE TO TIME LIMIT|\bState=TIMEOUT\b|Reached time limit|DUE TO JOB TIME ?LIMIT",
          "the job reached its time limit", "Ask for more (slurm.time), or let it go on in a next job: raylaunch saves "
          "before the limit and requeues itself.", final=True, confidence=0.97),
    _rule("preempted", r"CANCELLED AT (\S+) DUE TO PREEMPTION|\bState=PREEMPTED\b|job \S+ (?:was |has been )?preempted",
          "the job was preempted", "Run it with requeue (raylaunch does), or in a partition or QOS that is not preempted.",
          final=True, confidence=0.97),
    _rule("node_failure", r"CANCELLED AT (\S+) DUE TO NODE (?:FAILURE|FAIL)|\bState=NODE_FAIL\b|NODE FAILURE|"
          r"srun: error: Node failure on (\S+)|Job step \S+ aborted: node (\S+) (?:failed|is down)",
          "a node failed", "The node is out of your hands: exclude it (slurm.exclude), tell the admins, resume from the "
          "last checkpoint.", final=True, confidence=0.95),
    _rule("oom_cuda", r"CUDA out of memory|torch\.(?:cuda\.)?OutOfMemoryError|CUDA error: out of memory|"
          r"CUBLAS_STATUS_ALLOC_FAILED|Cuda failure (?:\d+ )?'out of memory'|hip(?:Error)?OutOfMemory|HIP out of memory",
          "a GPU ran out of memory", _SMALLER, confidence=0.97),
    _rule("oom_host", r"unable to (?:allocate|open|mmap|write|resize) .*shared memory|killed by signal: Bus error|insufficient shared memory",
          "/dev/shm, in which data workers hand over their batches, is full", "Give the container a larger one (--shm-size, "
          "--ipc=host), use fewer data workers, or torch.multiprocessing.set_sharing_strategy('file_system')."),
    _rule("oom_host", r"oom[-_ ]kill(?:er|ed)?\b|DataLoader worker \(pid[^)]*\) is killed by signal: Killed|Out Of Memory|OUT_OF_MEMORY|Detected (\d+) oom[-_]kill event|"
          r"Killed process (\d+)|exceeded (?:job |step )?memory limit|MemoryError\b|Unable to allocate .* for an array|"
          r"DefaultCPUAllocator: (?:can't|not enough) (?:allocate )?memory|Cannot allocate memory|std::bad_alloc|"
          r"worker (?:was )?killed due to (?:the node running low on )?memory|OutOfMemoryError: Task was killed",
          "a host ran out of memory", _HOST_SMALLER, confidence=0.93),
    # -- GPUs
    _rule("gpu_fault", r"\bXid\b[^\d]*(\d+)|uncorrectable ECC|double bit ECC|CUDA error: (?:uncorrectable|hardware)|"
          r"GPU has fallen off the bus|unspecified launch failure|CUDA error: unknown error|NVLink.*(?:error|fatal)|"
          r"an illegal instruction was encountered|CUDA-capable device\(s\) is/are busy or unavailable",
          "a GPU is faulty", "Exclude the node (slurm.exclude) and tell the admins, with this line; resume from the last "
          "checkpoint.", confidence=0.9),
    _rule("gpu_missing", r"no CUDA GPUs are available|No CUDA-capable device|Found no NVIDIA driver|invalid device ordinal|"
          r"CUDA driver version is insufficient|Torch not compiled with CUDA enabled|NVML: Driver/library version mismatch|"
          r"Failed to initialize NVML|torch\.cuda\.is_available\(\) (?:is|returned) False",
          "there is no GPU where the program looks for one", "Ask for GPUs (slurm.gpus_per_node or gres), and check "
          "`srun nvidia-smi` and CUDA_VISIBLE_DEVICES there; torch's build must fit the driver."),
    # -- submission
    _rule("slurm_submit", r"(?:sbatch|srun|salloc): error: (?!.*(?:task|node failure|slurmstepd))(.*(?:invalid|not (?:available|"
          r"permitted|allowed|valid)|Unable to allocate|Requested|violat|Batch job submission failed|limit|gres|Memory specification).*)",
          "Slurm refused the request: {0}", "Compare with `sinfo -o '%P %l %G %m'` and `sacctmgr show assoc user=$USER`; "
          "then change slurm.partition, account, qos, time or gpus_per_node.", confidence=0.95),
    _rule("slurm_submit", r"(?:sbatch|salloc): error: (?!.*slurmstepd)(.*)|srun: error: (Only allocated \d+ nodes asked for.*|"
          r"Unable to create step.*)", "Slurm refused the request: {0}{1}", "See `man sbatch` for what it names, and "
          "`scontrol show job` for what the job has.", confidence=0.8),
    _rule("environment_missing", r"Lmod has detected the following error|ModuleCmd_Load\.c|Unable to locate a modulefile|"
          r"The following module\(s\) are unknown|"
          r"(?:FATAL|ERROR):\s+(?:container|could not open image|Image file|image for)|pyxis: (?:failed|couldn't|error)|"
          r"enroot-\w+.*\[ERROR\]|execve\(\): (\S+): No such file or directory|"
          r"conda: error|EnvironmentNameNotFound|bad interpreter: No such file|GLIBC(?:XX)?_[\d.]+' not found|"
          r"error while loading shared libraries: (\S+)|InvalidCxxCompiler|No working C\+\+ compiler|Failed to find C compiler",
          "the program's environment is not there (module, container, command or library)", _ENVIRONMENT),
    _rule("environment_missing", r"(\S+): command not found|: \d+: (\S+): not found$|/bin/activate: No such file", "a command of the script is not there",
          _ENVIRONMENT, Tier.SETUP),
    # -- storage
    _rule("disk_full", r"No space left on device|Disk quota exceeded|\[Errno (?:28|122)\]|ENOSPC|EDQUOT|"
          r"PytorchStreamWriter failed writing|file write failed|inline_container\.cc.*unexpected pos|iostream error",
          "the storage is full, or its quota is", "Make room (`raylaunch checkpoints RUN gc`, `lfs quota -u $USER DIR`), or "
          "name another checkpoint.checkpoint_dir.", confidence=0.95),
    _rule("permission", r"PermissionError|Permission denied|\[Errno (?:13|1|30)\]|Read-only file system|Operation not permitted",
          "a file or device may not be used", "Check owner and mode of that path on the node, and the mount (read-only?).",
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
          "the processes cannot reach each other over the network", "Name the interface that leads to the other nodes "
          "(cluster.interface, NCCL_SOCKET_IFNAME, GLOO_SOCKET_IFNAME), and see NCCL_DEBUG=INFO.", confidence=0.85),
    # -- the program's own
    _rule("import_error", r"\b(ModuleNotFoundError|ImportError): (.*)", "{1}",
          "Install it in the environment that the nodes use; " + _ENVIRONMENT, confidence=0.95),
    _rule("mismatch", r"(size mismatch (?:for|between) .*|Missing key(?:\(s\))? in (?:checkpoint )?state_dict.*|Unexpected key\(s\) in state_dict.*|"
          r"mat1 and mat2 shapes cannot be multiplied.*|shape .* is invalid for input of size.*|"
          r"The size of tensor a .* must match.*|Expected .* to have .* dimension.*|another shape than model.*|"
          r"Error\(s\) in loading state_dict.*|is not a multiple of .*tp_size.*|another order of samples.*|"
          r"expected scalar type .* but found .*|index out of range in self|Target \d+ is out of bounds)",
          "shapes do not fit: {0}", "Compare the checkpoint's or the data's shape with the model in the config.", confidence=0.9),
    _rule("nan", r"(?:loss|gradient|grad_norm|norm)\b[^\n]{0,60}\b(?:is|are|became|=|:|was)?\s*(?:nan|inf|non-?finite|not finite)\b|"
          r"FloatingPointError|loss scale already at minimum|Function \S+ returned nan|returned nan values|Nan(?:s)? (?:found|detected)|(?:Found|contains) (?:NaN|inf)",
          "the loss or a gradient is no finite number", "Look at the step's data and learning rate; optimizer.on_nonfinite: "
          "skip or rollback leaves such a step out.", confidence=0.88),
    _rule("data_error", r"(UnicodeDecodeError: .*|JSONDecodeError: .*|ArrowInvalid: .*|ParserError: .*|pyarrow\.lib\.\w+: .*|"
          r"DataError: .*|BadZipFile.*|BadGzipFile.*|zlib\.error.*|tarfile\.\w+Error.*|unexpected end of (?:data|file|stream).*|UnpicklingError.*|EOFError: (?:Ran out of input|Compressed file ended).*|PytorchStreamReader failed.*|SafetensorError: .*|"
          r"num_samples should be a positive integer.*|should not be an empty iterable.*|cannot stat .*No such file.*|cannot identify image file.*|"
          r"(?:corrupt(?:ed)?|truncated) (?:file|shard|record|data|image).*|DataLoader worker .*exited unexpectedly.*)",
          "the data cannot be read: {0}", "Look at that file; `raylaunch data inspect DIR --verify` compares checksums.",
          confidence=0.85),
    _rule("not_shared", r"(?:FileNotFoundError|No such file or directory|not a local folder|does not exist|chdir to|can't open file)"
          rf".{{0,120}}?({_LOCAL}/[^\s'\"]*)|({_LOCAL}/[^\s'\"]*).{{0,80}}(?:No such file|does not exist|not a local folder)|"
          r"directory is not shared|not (?:on )?(?:a )?shared (?:file ?system|storage)|does not read .* as rank 0 does",
          "a path is not the same on all nodes", _PATHS, confidence=0.8),
    _rule("data_error", r"RunError: (data\.\w+: nothing matches .*)", "{0}", "Give files, directories or globs that exist on "
          "every node, as absolute paths; `raylaunch train --check` finds it before nodes are held."),
    _rule("data_error", r"FileNotFoundError: (.*)", "a file is not there: {0}", "Check the path, and that the step before "
          "wrote it; on another node, that the directory is shared.", Tier.ERROR, 0.7),
    # -- what may be somebody else's doing
    _rule("hang", r"no step for (\d+)|hang(?:s|ed)? (?:at|in|on)|the same hang|Watchdog caught collective.*last enqueued|"
          r"blocked for more than \d+ seconds|no progress (?:for|since)|is stuck (?:in|at)|"
          r"(?:ranks?|process(?:es)?) .*(?:did not|has not|have not|never) (?:reach|arrive|respond|join|enter)", "a rank did not come to the next collective", "See its stack "
          "(attempts/N/rank-R.stack.txt, or py-spy dump); ranks that take other branches of the code hang like this.",
          Tier.SYMPTOM, 0.7),
    _rule("nccl_timeout", r"Rank (?P<rank>\d+) failed to pass monitoredBarrier", "rank {0} did not come to a barrier in time",
          "See what that rank did meanwhile (its log, py-spy dump); let only work that all ranks share lie between two barriers.",
          Tier.SYMPTOM, 0.8),
    _rule("nccl_timeout", r"Watchdog caught collective operation timeout|ProcessGroupNCCL.*(?:timed? ?out|Timeout)|"
          r"NCCL.*(?:timeout|timed out)|collective operation timeout|Timed out waiting \d+ms for (?:recv|send)",
          "a collective timed out", "Some rank was late or gone: look at the rank that did not time out, and for a slow node; "
          "distributed.comm_timeout is how long is waited.", Tier.SYMPTOM, 0.7),
    _rule("network_setup", r"RendezvousConnectionError|RendezvousTimeoutError|timed out.* waiting for clients|DistStoreError",
          "the processes did not find each other", "Did all of them start? See the logs of those that did not come; else name "
          "the interface that leads to the other nodes (cluster.interface, NCCL_SOCKET_IFNAME, GLOO_SOCKET_IFNAME).",
          Tier.SYMPTOM, 0.7),
    _rule("unknown", r"Segmentation fault", "a process crashed (SIGSEGV)", "Look for a native library that does not fit: torch, "
          "CUDA, a compiled extension; `faulthandler` shows where.", Tier.SYMPTOM, 0.5),
    # -- never a cause, where there is one
    _rule("unknown", r"Connection (?:reset|closed|refused)|closed by peer|Broken pipe|ECONNRESET|BrokenPipeError|SIGTERM|"
          r"signal 15|exit(?:ed with exit)? code:? ?143|code -15|Signal 15|ChildFailedError|Terminated\b|"
          r"DistNetworkError|DistBackendError|remote process exited|ncclRemoteError|RayActorError|ActorDiedError|WorkerCrashedError|Sending process \d+ closing signal|"
          r"KeyboardInterrupt|STEP .* CANCELLED AT|tcpstore|store->get|recvValue failed",
          "a process was ended, or lost its partner", "Look for what went before, in the other ranks' logs.", Tier.CASCADE, 0.3),
)  # fmt: skip

EXITS: dict[int, tuple[Kind, Tier, str, str, float]] = {
    137: ("oom_host", Tier.SYMPTOM, "a process was killed (exit code 137, SIGKILL): mostly for memory", _HOST_SMALLER, 0.55),
    139: ("unknown", Tier.ERROR, "a process crashed (exit code 139, SIGSEGV)", "Look for a native library that does not fit: "
          "torch, CUDA, a compiled extension; `faulthandler` shows where.", 0.5),
    134: ("unknown", Tier.SYMPTOM, "a process aborted (exit code 134, SIGABRT)", "Look for what was said before it.", 0.4),
    143: ("unknown", Tier.CASCADE, "a process was told to end (exit code 143, SIGTERM)", "Look for who told it.", 0.3),
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
    "expected", "multiple of", "order of samples", "nan", "inf", "finite", "decode", "corrupt", "truncated", "zip", "pickl",
    "eof", "dataloader", "no such file", "hang", "step for", "blocked", "collective", "timeout", "timed out", "connection",
    "closed", "pipe", "reset", "sig", "exit", "terminated", "process", "store", "recv", "interrupt", "illegal", "does not read",
    "during handling", "stuck", "progress", "reach", "arrive", "overflow", "end of", "chdir", "can't open", "local folder",
    "not exist", "scale already", "direct cause", 'file "', "(local_rank", "segmentation", "compiler", "index out", "out of bounds",
    "num_samples", "empty iterable", "root cause", "cannot stat", "unexpected pos",
)  # fmt: skip
"""A line without any of these means nothing to any rule: most lines of a log are progress, and rules are dear."""
