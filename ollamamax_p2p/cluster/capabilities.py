"""What this machine is fit for."""

from pathlib import Path

POWER_SUPPLIES = Path("/sys/class/power_supply")


def has_battery(supplies: Path = POWER_SUPPLIES) -> bool:
    """Whether the machine runs on a battery at times, so that it may sleep or be carried away.

    Linux tells; elsewhere the answer is False, and `cluster.voter = "no"` says it.
    """
    try:
        kinds = [(each / "type").read_text(encoding="ascii") for each in supplies.iterdir()]
        scopes = [(each / "scope") for each in supplies.iterdir()]
        of_devices = sum(each.exists() and each.read_text().strip() == "Device" for each in scopes)
    except (OSError, UnicodeDecodeError):
        return False
    # A mouse or keyboard has a battery too, and says that its scope is a device.
    return sum(kind.strip() == "Battery" for kind in kinds) > of_devices


def may_vote(wish: str, *, battery: bool) -> bool:
    """Whether autopilot may make this node a voter. wish: `cluster.voter`."""
    return wish == "yes" or (wish == "auto" and not battery)
