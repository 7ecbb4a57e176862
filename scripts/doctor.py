"""Examine machine and configuration: python scripts/doctor.py --config configs/9m.yaml

Examine a model: python scripts/doctor.py --model runs/quickstart/best
"""

import sys

from tinystories_slm.cli import doorway
from tinystories_slm.doctor import doctor, doctor_args

if __name__ == "__main__":
    doorway(doctor, doctor_args(sys.argv[1:]))
