"""Reading, simulating and describing image pairs."""

from .mtf import decimate, degrade, mtf_filter, mtf_kernel
from .resample import imresize, interp23, lpan, shift
from .sensors import SENSORS, Sensor, get_sensor

__all__ = [
    "SENSORS",
    "Sensor",
    "decimate",
    "degrade",
    "get_sensor",
    "imresize",
    "interp23",
    "lpan",
    "mtf_filter",
    "mtf_kernel",
    "shift",
]
