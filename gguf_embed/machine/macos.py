"""What macOS tells through sysctl."""

from __future__ import annotations

from gguf_embed.machine.host import Cores, Cpu, Host, whole_number


def read_cpu(host: Host) -> Cpu:
    """The CPU's name; of its features, those that Apple tells."""
    features: tuple[str, ...] = ()
    if host.arch == "arm64":  # every Apple core has neon; an Intel Mac's features stay untold
        named = {"dotprod": "FEAT_DotProd", "i8mm": "FEAT_I8MM", "sme": "FEAT_SME"}
        have = [name for name, key in named.items() if sysctl(host, f"hw.optional.arm.{key}")]
        features = ("neon", *have)
    model = host.run(("sysctl", "-n", "machdep.cpu.brand_string")) or ""
    return Cpu(model=model, features=features)


def read_cores(host: Host) -> Cores:
    """Cores, of which the fast ones are usable."""
    physical = sysctl(host, "hw.physicalcpu") or host.cores()[0]
    performance = sysctl(host, "hw.perflevel0.physicalcpu") or physical
    return Cores(physical=physical, performance=performance, usable=performance)


def sysctl(host: Host, key: str) -> int:
    """A number of macOS's sysctl; 0 where it does not exist."""
    return whole_number(host.run(("sysctl", "-n", key)) or "") or 0
