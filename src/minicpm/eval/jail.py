"""Runs one program that nobody has read, as a script of its own: `python -I jail.py FOLDER SECONDS MEGABYTES`.

The program comes by standard input after a first line that holds a token; the token is written to standard output when
the program has ended by itself, so that a program that leaves early is not taken for one that passed. Before it runs:
limits on processor time, memory, files and their sizes; no new privileges; Landlock, so that it writes below FOLDER and
nowhere else; a seccomp filter, without which nothing runs, that refuses sockets, new processes, other programs, signals
and tracing. Linux on x86-64 and arm64 only. It imports the standard library alone.

What this leaves out: hiding files that may be read, and limits on how often a program is run (`code.py`).
"""

from __future__ import annotations

import ctypes
import os
import platform
import resource
import struct
import sys

# Numbers of the refused system calls, and the architecture's own in audit.h.
_REFUSED = {
    "x86_64": (
        0xC000003E,
        56,
        {
            "socket": 41, "connect": 42, "fork": 57, "vfork": 58, "execve": 59, "kill": 62, "ptrace": 101,
            "mount": 165, "tkill": 200, "tgkill": 234, "process_vm_writev": 311, "execveat": 322,
            "pidfd_send_signal": 424, "io_uring_setup": 425,
        },
    ),
    "aarch64": (
        0xC00000B7,
        220,
        {
            "mount": 40, "ptrace": 117, "kill": 129, "tkill": 130, "tgkill": 131, "socket": 198, "connect": 203,
            "execve": 221, "process_vm_writev": 271, "execveat": 281, "pidfd_send_signal": 424, "io_uring_setup": 425,
        },
    ),
}  # fmt: skip
_CLONE3 = 435
_X32 = 0x40000000
_EPERM, _ENOSYS = 1, 38
_CLONE_THREAD = 0x10000
_LOAD, _EQUAL, _AT_LEAST, _ANY_BIT, _RETURN = 0x20, 0x15, 0x35, 0x45, 0x06
_ALLOW, _ERROR, _KILL = 0x7FFF0000, 0x00050000, 0x80000000
# Landlock's access rights that change a file system, by the version that brought them.
_WRITES = {1: 0b1111111110010, 2: 1 << 13, 3: 1 << 14}
_LANDLOCK_CREATE, _LANDLOCK_ADD, _LANDLOCK_RESTRICT = 444, 445, 446


def supported() -> bool:
    """Whether this machine can hold a program."""
    return sys.platform == "linux" and platform.machine() in _REFUSED


def enter(folder: str, seconds: int, megabytes: int) -> None:
    """Put this process into the jail for good.

    Raises:
        OSError: the machine refuses a part of it.
    """
    for kind, limit in (
        (resource.RLIMIT_CPU, seconds),
        (resource.RLIMIT_AS, megabytes << 20),
        (resource.RLIMIT_FSIZE, 16 << 20),
        (resource.RLIMIT_NOFILE, 64),
        (resource.RLIMIT_CORE, 0),
    ):
        resource.setrlimit(kind, (limit, limit))
    libc = ctypes.CDLL(None, use_errno=True)
    _check(libc.prctl(38, 1, 0, 0, 0), "no new privileges")
    _write_only_below(libc, folder)
    _filter_calls(libc)


def _write_only_below(libc: ctypes.CDLL, folder: str) -> None:
    version = libc.syscall(_LANDLOCK_CREATE, None, ctypes.c_size_t(0), 1)
    if version < 1:
        raise OSError("this kernel has no Landlock")
    writes = sum(bits for since, bits in _WRITES.items() if since <= version)
    rules = ctypes.create_string_buffer(struct.pack("Q", writes))
    ruleset = libc.syscall(_LANDLOCK_CREATE, rules, ctypes.c_size_t(8), 0)
    _check(ruleset, "Landlock")
    place = os.open(folder, os.O_PATH)
    rule = ctypes.create_string_buffer(struct.pack("=Qi", writes, place))
    _check(libc.syscall(_LANDLOCK_ADD, ruleset, 1, rule, 0), "Landlock's rule")
    _check(libc.syscall(_LANDLOCK_RESTRICT, ruleset, 0), "Landlock's restriction")
    os.close(place)
    os.close(ruleset)


def _filter_calls(libc: ctypes.CDLL) -> None:
    architecture, clone, refused = _REFUSED[platform.machine()]
    numbers = sorted(refused.values())
    # Jumps count instructions from the next one; the verdicts stand at the end: allow, refuse, no such call, kill.
    program = [(_LOAD, 0, 0, 4), (_EQUAL, 0, -4, architecture), (_LOAD, 0, 0, 0), (_AT_LEAST, -2, 0, _X32)]
    program += [(_EQUAL, -3, 0, _CLONE3)]
    program += [(_EQUAL, -2, 0, number) for number in numbers]
    program += [(_EQUAL, 0, -1, clone), (_LOAD, 0, 0, 16), (_ANY_BIT, -1, -2, _CLONE_THREAD)]
    end = len(program)
    verdicts = [_ALLOW, _ERROR | _EPERM, _ERROR | _ENOSYS, _KILL]
    code = b""
    for index, (kind, if_true, if_false, value) in enumerate(program):
        jumps = [end + (-1 - jump) - index - 1 if jump < 0 else jump for jump in (if_true, if_false)]
        code += struct.pack("HBBI", kind, *jumps, value)
    code += b"".join(struct.pack("HBBI", _RETURN, 0, 0, verdict) for verdict in verdicts)
    instructions = ctypes.create_string_buffer(code)
    header = ctypes.create_string_buffer(struct.pack("HxxxxxxP", len(code) // 8, ctypes.addressof(instructions)))
    _check(libc.prctl(22, 2, header, 0, 0), "seccomp")


def _check(result: int, what: str) -> None:
    if result < 0:
        raise OSError(ctypes.get_errno(), f"{what} was refused")


def main() -> None:
    """Read the token and the program, enter the jail, run."""
    folder, seconds, megabytes = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
    token, program = sys.stdin.readline(), sys.stdin.read()
    os.chdir(folder)
    answers = os.dup(1)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    enter(folder, seconds, megabytes)
    exec(compile(program, "program.py", "exec"), {"__name__": "__main__"})
    os.write(answers, token.encode())


if __name__ == "__main__":
    main()
