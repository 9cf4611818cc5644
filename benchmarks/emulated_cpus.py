"""The accelerator's kernels on CPUs that are not at hand, under the emulator Bochs: right or wrong.

    python benchmarks/emulated_cpus.py KERNEL [--bochs PATH] [--display NAME] [--sets SET ...]

KERNEL is a Linux kernel: a vmlinuz, or Debian's package of one (`apt-get download` of the package
that linux-image-cloud-amd64 depends on; that kernel boots quickest). Bochs 3.0 must have been
compiled for it: CONTRIBUTING.md says how. Debian's packages bochsbios, vgabios, isolinux,
syslinux-common and genisoimage do the rest. Run it with the Python whose llama-cpp-python the
kernels are for.

The kernels' test program is compiled with every instruction set, and is the only process of the
Linux that boots on each emulated CPU. It tests one set, and the kernel tells how it ended. A line
for each set: failures, a digest of all results, seconds. Sets with vectors of one length must have
one digest. It takes a minute or two for each set and proves results, never speed.
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

# Set: model of Bochs, what it is given besides, bits of the set's vectors. Linux does not get
# through its start on the models that have VNNI themselves; those that it runs on do not tell of
# what they were given, so the test program does not ask.
CPUS = {
    "AVX2": ("corei7_haswell_4770", "", 256),
    "AVX-VNNI": ("corei7_haswell_4770", "avx_vnni", 256),
    "AVX-512": ("corei7_skylake_x", "", 512),
    "AVX-512 VNNI": ("corei7_skylake_x", "avx512vnni", 512),
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
    parser.add_argument("--display", default="nogui", help="a display library that it has")
    parser.add_argument("--sets", nargs="+", choices=CPUS, default=list(CPUS), metavar="SET")
    args = parser.parse_args()
    for command, package in {**NEEDED, args.bochs: "bochs"}.items():
        if shutil.which(command) is None:
            sys.exit(f"{command} is missing: it comes with {package}")
    for file, package in (
        (ISOLINUX, "isolinux"),
        (LDLINUX, "syslinux-common"),
        (BIOS, "bochsbios"),
        (VGA_BIOS, "vgabios"),
    ):
        if not file.exists():
            sys.exit(f"{file} is missing: install the package {package}")
    with tempfile.TemporaryDirectory() as folder:
        tree = make_tree(args.kernel, Path(folder))
        with ThreadPoolExecutor(os.cpu_count()) as workers:
            verdicts = list(workers.map(lambda name: run(name, tree, args), args.sets))
    digests = {bits: {d for b, d in verdicts if b == bits and d} for bits, _ in verdicts}
    for bits, different in digests.items():
        if len(different) > 1:
            print(f"sets with vectors of {bits} bits differ: {', '.join(sorted(different))}")
    if not all(d for _, d in verdicts) or any(len(d) > 1 for d in digests.values()):
        sys.exit(1)


def run(name: str, tree: Path, args: argparse.Namespace) -> tuple[int, str]:
    """Test a set; the length of its vectors and the digest, "" where it failed."""
    model, added, bits = CPUS[name]
    word = name.replace(" ", "_")
    disc, serial, log, configuration = (
        tree.with_name(f"{word}.{kind}") for kind in ("iso", "serial", "log", "bochsrc")
    )
    make_disc(tree, f"only {word}", disc)
    features = f", add_features={added}" if added else ""
    configuration.write_text(
        f"""display_library: {args.display}
romimage: file={BIOS}
vgaromimage: file={VGA_BIOS}
cpu: model={model}, count=1, ips=100000000, reset_on_triple_fault=0{features}
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
    right = ended and int(ended[1], 16) == 0 and verdict and verdict[1] == name
    told = f"{verdict[2]} failures, digest {verdict[3]}" if verdict else "no verdict"
    print(f"{name}: {told}, {time.monotonic() - began:.0f} s", flush=True)
    if right and verdict:
        return bits, verdict[3]
    print(
        "\n".join(said.splitlines()[-20:] or log.read_text("utf-8", "replace").splitlines()[-20:])
    )
    return bits, ""


def make_tree(kernel: Path, folder: Path) -> Path:
    """What is on every disc: the kernel, and the test program as its only process."""
    tree = folder / "tree"
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
    return tree


def make_disc(tree: Path, arguments: str, disc: Path) -> None:
    """A disc that boots the kernel and runs the test program with these arguments."""
    words = f"{WORDS} rdinit=/test_kernels -- {arguments}"
    configuration = disc.with_suffix(".cfg")
    configuration.write_text(f"default linux initrd=initrd {words}\nprompt 0\n")
    command = ["genisoimage", "-quiet", "-o", str(disc), "-b", "isolinux.bin", "-c", "boot.cat"]
    command += ["-no-emul-boot", "-boot-load-size", "4", "-boot-info-table", "-graft-points"]
    subprocess.run([*command, str(tree), f"isolinux.cfg={configuration}"], check=True)


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
