"""Format bytes, FLOP/s and seconds for people."""


def format_bytes(number: float) -> str:
    """Format bytes in powers of ten, as disks and data sheets do: `12 MB`, `3.4 GB`."""
    scale, unit = next(
        ((scale, unit) for scale, unit in ((1e3, "kB"), (1e6, "MB")) if number < 999.5 * scale), (1e9, "GB")
    )
    number /= scale
    return f"{number:.1f} {unit}" if number < 9.95 else f"{number:,.0f} {unit}"


def format_flops(number: float) -> str:
    """Format operations per second: `450 GFLOP/s`, `312 TFLOP/s`."""
    scale, unit = (1e12, "TFLOP/s") if number >= 0.9995e12 else (1e9, "GFLOP/s")
    return f"{number / scale:,.3g} {unit}" if number < 999.5 * scale else f"{number / scale:,.0f} {unit}"


def format_duration(seconds: float) -> str:
    """Format a duration: `40 s`, `12 min`, `3 h 05 min`."""
    if seconds < 59.5:
        return f"{seconds:.0f} s" if seconds >= 0.95 else "1 s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"
