"""The accelerator's kernels on CPUs that are not at hand, under the emulator Bochs: right or wrong.

    python benchmarks/emulated_cpus.py KERNEL [--bochs PATH] [--display NAME] [--cpus MODEL ...]

KERNEL is a Linux kernel: a vmlinuz, or Debian's package of one (`apt-get download` of the package
that linux-image-cloud-amd64 depends on; that kernel boots quickest). Debian's packages bochs,
bochsbios, vgabios, isolinux, syslinux-common and genisoimage do the rest. Bochs from 3.0 on (Debian
13) knows AVX-VNNI; that of Debian 12 has AVX-512 only. Run it with the Python whose
llama-cpp-python the kernels are for.

The kernels' test program is compiled with every instruction set, and is the only process of the
Linux that each emulated CPU boots. It tests the kernels that the accelerator would take there, and
the kernel tells how it ended. A line for each CPU: its model, the set, failures, a digest of all
results, seconds. Sets with vectors of one length must have one digest. It takes minutes for each
CPU and proves results, never speed.
"""

from __future__ import annotations

import argparse
import gzip
import os
import re
import shutil
import stat
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).parents[1]

# Model of Bochs: the set that must be taken there, and bits of its vectors.
CPUS = {
    "corei7_haswell_4770": ("AVX2", 256),
    "arrow_lake": ("AVX-VNNI", 256),
    "corei7_skylake_x": ("AVX-512", 512),
    "corei7_icelake_u": ("AVX-512 VNNI", 512),
}
NEEDED = {"genisoimage": "genisoimage", "ldd": "libc-bin"}  # command: package
ISOLINUX = Path("/usr/lib/ISOLINUX/isolinux.bin")
LDLINUX = Path("/usr/lib/syslinux/modules/bios/ldlinux.c32")
BIOS = Path("/usr/share/bochs/BIOS-bochs-latest")
VGA_BIOS = Path("/usr/share/vgabios/vgabios.bin")
# Without AppArmor, whose start Bochs does not get through, and a timer that does not wake it.
WORDS = "console=ttyS0 quiet nokaslr mitigations=off lsm=capability lapic=notscdeadline"
LIMIT_S = 3600.0
VERDICT = re.compile(r"^(.+): (\d+) failures, digest (\w+)", re.MULTILINE)
ENDED = re.compile(r"Attempted to kill init! exitcode=0x(\w+)")  # the only process has ended


def main() -> None:
    parser = argparse.ArgumentParser(description="Test the kernels on emulated CPUs.")
    parser.add_argument("kernel", type=Path, help="vmlinuz, or a Debian package of one")
    parser.add_argument("--bochs", default="bochs", help="the emulator")
    parser.add_argument("--display", default="rfb", help="a display library that it has")
    parser.add_argument("--cpus", nargs="+", choices=CPUS, default=list(CPUS), metavar="MODEL")
    args = parser.parse_args()
    for command, package in {**NEEDED, args.bochs: "bochs"}.items():
        if shutil.which(command) is None:
            sys.exit(f"{command} is missing: install the package {package}")
    for file, package in (
        (ISOLINUX, "isolinux"),
        (LDLINUX, "syslinux-common"),
        (BIOS, "bochsbios"),
        (VGA_BIOS, "vgabios"),
    ):
        if not file.exists():
            sys.exit(f"{file} is missing: install the package {package}")
    with tempfile.TemporaryDirectory() as folder:
        disc = make_disc(args.kernel, Path(folder))
        models = [model for model in args.cpus if is_known(model, args.bochs)]
        with ThreadPoolExecutor(os.cpu_count()) as workers:
            verdicts = list(workers.map(lambda model: run(model, disc, args), models))
    digests = {bits: {d for b, d in verdicts if b == bits and d} for bits, _ in verdicts}
    for bits, different in digests.items():
        if len(different) > 1:
            print(f"sets with vectors of {bits} bits differ: {', '.join(sorted(different))}")
    if not verdicts or not all(d for _, d in verdicts) or any(len(d) > 1 for d in digests.values()):
        sys.exit(1)


def is_known(model: str, bochs: str) -> bool:
    """Whether the emulator has the model; a line where it has not."""
    done = subprocess.run([bochs, "--help", "cpu"], capture_output=True, text=True, check=False)
    if model in (done.stdout + done.stderr).split():
        return True
    print(f"{model}: not tested, this Bochs does not know it ({CPUS[model][0]})")
    return False


def run(model: str, disc: Path, args: argparse.Namespace) -> tuple[int, str]:
    """Boot the disc on the model; the length of its vectors and the digest, "" where it failed."""
    expected, bits = CPUS[model]
    serial, log = disc.with_name(f"{model}.serial"), disc.with_name(f"{model}.log")
    configuration = disc.with_name(f"{model}.bochsrc")
    configuration.write_text(
        f"""display_library: {args.display}
romimage: file={BIOS}
vgaromimage: file={VGA_BIOS}
cpu: model={model}, count=1, ips=100000000, reset_on_triple_fault=0
memory: guest=256, host=256
ata0-master: type=cdrom, path={disc}, status=inserted
boot: cdrom
com1: enabled=1, mode=file, dev={serial}
clock: sync=none
log: {log}
panic: action=fatal
"""
    )
    serial.touch()
    began = time.monotonic()
    with subprocess.Popen(
        [args.bochs, "-q", "-f", str(configuration)],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    ) as bochs:
        while (
            bochs.poll() is None
            and not (ended := ENDED.search(serial.read_text("utf-8", "replace")))
            and time.monotonic() - began < LIMIT_S
        ):
            time.sleep(0.5)
        bochs.kill()
    said = serial.read_text("utf-8", "replace")
    ended, verdict = ENDED.search(said), VERDICT.search(said)
    right = ended and int(ended[1], 16) == 0 and verdict and verdict[1] == expected
    if verdict:
        told = f"{verdict[1]}: {verdict[2]} failures, digest {verdict[3]}"
    else:
        told = f"{expected}: no verdict"
    print(f"{model}: {told}, {time.monotonic() - began:.0f} s", flush=True)
    if right and verdict:
        return bits, verdict[3]
    print(
        "\n".join(said.splitlines()[-20:] or log.read_text("utf-8", "replace").splitlines()[-20:])
    )
    return bits, ""


def make_disc(kernel: Path, folder: Path) -> Path:
    """A disc that boots the kernel, with the test program as its only process."""
    tree = folder / "disc"
    tree.mkdir()
    if kernel.suffix == ".deb":
        subprocess.run(["dpkg-deb", "-x", kernel, folder / "package"], check=True)
        kernel = next((folder / "package" / "boot").glob("vmlinuz-*"))
    shutil.copyfile(kernel, tree / "linux")
    shutil.copyfile(ISOLINUX, tree / "isolinux.bin")
    shutil.copyfile(LDLINUX, tree / "ldlinux.c32")
    build = [sys.executable, ROOT / "native" / "build.py", "--program", folder]
    subprocess.run(build, check=True, stdout=subprocess.DEVNULL)
    program = folder / "test_kernels"
    with gzip.open(tree / "initrd", "wb", compresslevel=1) as file:
        file.write(b"".join(archive(program)))
    init = "rdinit=/test_kernels -- fastest"
    (tree / "isolinux.cfg").write_text(f"default linux initrd=initrd {WORDS} {init}\nprompt 0\n")
    command = ["genisoimage", "-quiet", "-o", str(folder / "disc.iso"), "-b", "isolinux.bin"]
    command += ["-c", "boot.cat", "-no-emul-boot", "-boot-load-size", "4", "-boot-info-table"]
    subprocess.run([*command, str(tree)], check=True)
    return folder / "disc.iso"


def archive(program: Path) -> Iterator[bytes]:
    """An archive for Linux's first file system (cpio, newc): the program and its libraries."""
    files = {"test_kernels": program}
    listed = subprocess.run(["ldd", program], capture_output=True, text=True, check=True).stdout
    for path in re.findall(r"(/\S+) \(0x", listed):
        files[path.strip("/")] = Path(path)
    folders = {str(parent) for name in files for parent in Path(name).parents} - {"."} | {"dev"}
    number = 0
    for name in sorted(folders):
        number += 1
        yield entry(number, name, stat.S_IFDIR | 0o755)
    yield entry(number + 1, "dev/console", stat.S_IFCHR | 0o600, device=(5, 1))
    for name, path in files.items():
        number += 1
        yield entry(number + 1, name, stat.S_IFREG | 0o755, path.read_bytes())
    yield entry(0, "TRAILER!!!", 0)


def entry(
    number: int, name: str, mode: int, data: bytes = b"", device: tuple[int, int] = (0, 0)
) -> bytes:
    fields = [number, mode, 0, 0, 1, 0, len(data), 0, 0, *device, len(name) + 1, 0]
    head = b"070701" + b"".join(b"%08X" % field for field in fields) + os.fsencode(name) + b"\0"
    return padded(head) + padded(data)


def padded(data: bytes) -> bytes:
    return data + b"\0" * (-len(data) % 4)


if __name__ == "__main__":
    main()
