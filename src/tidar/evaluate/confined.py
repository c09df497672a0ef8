"""Runs a program that nobody has read, in a process that gives up its rights first.

`sandbox.py` starts this file with `python -I`: standard library only, no imports of ours. Limits, then Landlock (which
files), then seccomp (which system calls); the kernel keeps all three to the end of the process. Linux alone has them;
elsewhere this ends with an error before the program is compiled.
"""

import ctypes
import json
import os
import platform
import resource
import struct
import sys
import types

MACHINES = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}
"""AUDIT_ARCH of the machines whose system call numbers stand below."""

# What a solution to a programming exercise never needs, by name: number on x86_64, number on aarch64.
# Landlock says nothing about metadata (chmod, chown, times, attributes), about signals before Linux 6.12, or about any
# socket but TCP; here they all end. -1: does not exist there.
DENIED = {
    # other processes: none are started, none are reached
    **{"fork": (57, -1), "vfork": (58, -1), "execve": (59, 221), "execveat": (322, 281), "ptrace": (101, 117)},
    **{"kill": (62, 129), "tkill": (200, 130), "tgkill": (234, 131), "rt_sigqueueinfo": (129, 138)},
    **{"rt_tgsigqueueinfo": (297, 240), "pidfd_send_signal": (424, 424), "pidfd_open": (434, 434)},
    **{"pidfd_getfd": (438, 438), "process_vm_readv": (310, 270), "process_vm_writev": (311, 271)},
    **{"process_madvise": (440, 440), "kcmp": (312, 272), "setpgid": (109, 154), "setsid": (112, 157)},
    **{"setpriority": (141, 140), "sched_setparam": (142, 118), "sched_setscheduler": (144, 119)},
    **{"sched_setaffinity": (203, 122), "sched_setattr": (314, 274), "ioprio_set": (251, 30), "setrlimit": (160, 164)},
    # the network, and ways around a filter of system calls
    **{
        "socket": (41, 198),
        "io_uring_setup": (425, 425),
        "io_uring_enter": (426, 426),
        "io_uring_register": (427, 427),
    },
    # memory that outlives the process or is not its own
    **{"shmget": (29, 194), "semget": (64, 190), "msgget": (68, 186), "mq_open": (240, 180)},
    **{"memfd_create": (319, 279), "memfd_secret": (447, 447), "userfaultfd": (323, 282)},
    # files: contents by path, and metadata
    **{"truncate": (76, 45), "chmod": (90, -1), "fchmod": (91, 52), "fchmodat": (268, 53), "fchmodat2": (452, 452)},
    **{"chown": (92, -1), "fchown": (93, 55), "lchown": (94, -1), "fchownat": (260, 54)},
    **{"setxattr": (188, 5), "lsetxattr": (189, 6), "fsetxattr": (190, 7), "setxattrat": (463, 463)},
    **{"removexattr": (197, 14), "lremovexattr": (198, 15), "fremovexattr": (199, 16), "removexattrat": (466, 466)},
    **{"utime": (132, -1), "utimes": (235, -1), "futimesat": (261, -1), "utimensat": (280, 88)},
    **{"name_to_handle_at": (303, 264), "open_by_handle_at": (304, 265), "fanotify_init": (300, 262)},
    # the machine: mounts, namespaces, users, clocks, the kernel
    **{"mount": (165, 40), "umount2": (166, 39), "pivot_root": (155, 41), "chroot": (161, 51), "open_tree": (428, 428)},
    **{"move_mount": (429, 429), "fsopen": (430, 430), "fsconfig": (431, 431), "fsmount": (432, 432)},
    **{"fspick": (433, 433), "mount_setattr": (442, 442), "unshare": (272, 97), "setns": (308, 268)},
    **{"setuid": (105, 146), "setgid": (106, 144), "setreuid": (113, 145), "setregid": (114, 143)},
    **{"setresuid": (117, 147), "setresgid": (119, 149), "setgroups": (116, 159), "capset": (126, 91)},
    **{"settimeofday": (164, 170), "clock_settime": (227, 112), "adjtimex": (159, 171), "clock_adjtime": (305, 266)},
    **{"sethostname": (170, 161), "setdomainname": (171, 162), "reboot": (169, 142), "acct": (163, 89)},
    **{"setfsuid": (122, 151), "setfsgid": (123, 152), "vhangup": (153, 58), "quotactl_fd": (443, 443)},
    **{"migrate_pages": (256, 238), "move_pages": (279, 239)},
    **{"swapon": (167, 224), "swapoff": (168, 225), "syslog": (103, 116), "quotactl": (179, 60)},
    **{"init_module": (175, 105), "finit_module": (313, 273), "delete_module": (176, 106), "kexec_load": (246, 104)},
    **{"kexec_file_load": (320, 294), "bpf": (321, 280), "perf_event_open": (298, 241), "personality": (135, 92)},
    **{"add_key": (248, 217), "request_key": (249, 218), "keyctl": (250, 219), "iopl": (172, -1), "ioperm": (173, -1)},
}
CLONE, CLONE3, PRLIMIT, FCNTL = (56, 220), (435, 435), (302, 261), (72, 25)
CLONE_THREAD, F_SETOWN, F_SETSIG, F_SETOWN_EX = 0x00010000, 8, 10, 15
NEWEST = 470
"""Numbers from here on are system calls that this table was not written for."""

EPERM, ENOSYS = 1, 38
ALLOW, REFUSE, KILL = 0x7FFF0000, 0x00050000, 0x80000000
LOAD, EQUAL, AT_LEAST, ANY_BIT, RETURN = 0x20, 0x15, 0x35, 0x45, 0x06
"""Instructions of the filter: load a word, jump if equal / not less / a bit in common, return."""

CREATE_RULESET, ADD_RULE, RESTRICT_SELF = 444, 445, 446
WRITE_FILE, READ_FILE, READ_DIR, REMOVE_FILE, MAKE_REG, TRUNCATE = (1 << n for n in (1, 2, 3, 5, 8, 14))
FILE_RIGHTS = {1: 1 << 13, 2: 1 << 14, 3: 1 << 15, 5: 1 << 16}
"""Rights over files that a version of Landlock knows: all bits below."""


class UnconfinedError(Exception):
    """This machine cannot do it."""


def limit(seconds: float, megabytes: int, file_megabytes: int) -> None:
    """Processor time, address space, size of a file, open files; and no core dumps."""
    limits = {
        resource.RLIMIT_CPU: int(seconds) + 1,
        resource.RLIMIT_AS: megabytes << 20,
        resource.RLIMIT_FSIZE: file_megabytes << 20,
        resource.RLIMIT_NOFILE: 64,
        resource.RLIMIT_CORE: 0,
    }
    for what, most in limits.items():
        resource.setrlimit(what, (most, most))


def confine(folder: str) -> None:
    """Give up all rights but to read Python's own files and to keep plain files in `folder`.

    Raises:
        UnconfinedError: where the kernel cannot do that.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    machine = platform.machine()
    if sys.platform != "linux" or machine not in MACHINES or struct.calcsize("P") != 8:
        raise UnconfinedError(
            f"it is {sys.platform} on {machine}, and the filter is written for 64-bit Linux on x86_64 and aarch64"
        )
    if libc.prctl(38, 1, 0, 0, 0):  # PR_SET_NO_NEW_PRIVS
        raise UnconfinedError("no_new_privs is refused")
    _restrict_files(libc, folder)
    _restrict_calls(libc, machine)


def _restrict_files(libc: ctypes.CDLL, folder: str) -> None:
    version = libc.syscall(CREATE_RULESET, None, ctypes.c_size_t(0), 1)
    if version < 1:
        raise UnconfinedError(
            "its kernel has no Landlock (Linux 5.13 or newer, enabled at boot, not blocked by a container)"
        )
    known = next(bit for least, bit in sorted(FILE_RIGHTS.items(), reverse=True) if version >= least) - 1
    # A shorter structure is one of an older version: files, then TCP, then signals and abstract sockets.
    ruleset = struct.pack("=QQQ", known, 3, 3)[: 8 * (1 + (version >= 4) + (version >= 6))]
    handle = libc.syscall(CREATE_RULESET, ruleset, ctypes.c_size_t(len(ruleset)), 0)
    if handle < 0:
        raise UnconfinedError(f"Landlock does not start: {os.strerror(ctypes.get_errno())}")
    readable = {os.path.realpath(p) for p in (sys.prefix, sys.base_prefix, *sys.path, "/usr", "/lib", "/lib64") if p}
    rules = dict.fromkeys(readable, READ_FILE | READ_DIR)
    rules |= dict.fromkeys(("/etc/ld.so.cache", "/dev/zero", "/dev/urandom", "/dev/random"), READ_FILE)
    rules |= {"/dev/null": READ_FILE | WRITE_FILE}
    # Plain files, no folders in it: whoever watches its size need not search.
    rules |= {folder: READ_FILE | READ_DIR | WRITE_FILE | REMOVE_FILE | MAKE_REG | TRUNCATE}
    for path, rights in rules.items():
        try:
            place = os.open(path, os.O_PATH | os.O_CLOEXEC)
        except OSError:
            continue
        if not os.path.isdir(path):
            rights &= WRITE_FILE | READ_FILE | TRUNCATE
        if libc.syscall(ADD_RULE, handle, 1, struct.pack("=Qi", rights & known, place), 0):
            raise UnconfinedError(f"Landlock refuses a rule: {os.strerror(ctypes.get_errno())}")
        os.close(place)
    if libc.syscall(RESTRICT_SELF, handle, 0):
        raise UnconfinedError(f"Landlock does not start: {os.strerror(ctypes.get_errno())}")
    os.close(handle)


def _restrict_calls(libc: ctypes.CDLL, machine: str) -> None:
    program = filter_program(machine)
    code = ctypes.create_string_buffer(program)
    header = struct.pack("HxxxxxxP", len(program) // 8, ctypes.addressof(code))
    if libc.prctl(22, 2, header, 0, 0):  # PR_SET_SECCOMP, SECCOMP_MODE_FILTER
        raise UnconfinedError("its kernel, or the container it is in, has no seccomp filters")


def filter_program(machine: str) -> bytes:
    """The filter as classic BPF: eight bytes an instruction."""
    column = list(MACHINES).index(machine)
    denied = sorted(numbers[column] for numbers in DENIED.values() if numbers[column] >= 0)
    code = []

    def put(operation: int, operand: int, hit: int = 0, miss: int = 0) -> None:
        code.append(struct.pack("=HBBI", operation, hit, miss, operand))

    put(LOAD, 4)  # the calling convention
    put(EQUAL, MACHINES[machine], 1, 0)
    put(RETURN, KILL)
    put(LOAD, 0)  # the system call's number; 32-bit conventions number theirs from 2 ** 30
    put(AT_LEAST, NEWEST, 0, 1)
    put(RETURN, REFUSE | ENOSYS)
    for number in denied:
        put(EQUAL, number, 0, 1)
        put(RETURN, REFUSE | EPERM)
    put(EQUAL, FCNTL[column], 0, 6)
    put(LOAD, 24)  # what it does: files may not be made to send signals, which the kernel would send for them
    put(EQUAL, F_SETOWN, 3, 0)
    put(EQUAL, F_SETSIG, 2, 0)
    put(EQUAL, F_SETOWN_EX, 1, 0)
    put(RETURN, ALLOW)
    put(RETURN, REFUSE | EPERM)
    put(EQUAL, CLONE3[column], 0, 1)  # its flags lie in memory, which a filter cannot read; glibc then takes clone
    put(RETURN, REFUSE | ENOSYS)
    put(EQUAL, CLONE[column], 0, 3)
    put(LOAD, 16)  # its flags: threads may be started, processes not
    put(ANY_BIT, CLONE_THREAD, 0, 1 + 5)
    put(RETURN, ALLOW)
    put(EQUAL, PRLIMIT[column], 0, 5)
    put(LOAD, 32)  # its new limits: they may be read, not set
    put(EQUAL, 0, 0, 2)
    put(LOAD, 36)
    put(EQUAL, 0, 1, 0)
    put(RETURN, REFUSE | EPERM)
    put(RETURN, ALLOW)
    return b"".join(code)


def main() -> None:
    """Read a job from standard input, run it, and write what became of it to the descriptor that the job names."""
    job = json.loads(sys.stdin.buffer.read())
    sink, token = job["sink"], job["token"]

    def tell(**verdict: object) -> None:
        os.write(sink, json.dumps({"token": token, **verdict}).encode() + b"\n")

    try:
        limit(job["seconds"], job["megabytes"], job["file_megabytes"])
        confine(job["folder"])
    except (UnconfinedError, OSError, ValueError) as error:
        tell(unconfined=str(error))
        return
    module = types.ModuleType("candidate")
    sys.modules["candidate"] = module  # as dataclasses, among others, expect
    try:
        exec(compile(job["program"], "candidate", "exec"), module.__dict__)
    except BaseException as error:  # an exit is no pass
        tell(failed=f"{type(error).__name__}: {error}"[:300])
    else:
        tell(passed=True)


if __name__ == "__main__":
    main()
