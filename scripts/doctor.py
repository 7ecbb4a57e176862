"""Examine machine and configuration: python scripts/doctor.py --config configs/9m.yaml"""

from tinystories_slm.cli import doorway
from tinystories_slm.doctor import DoctorArgs, doctor

if __name__ == "__main__":
    doorway(doctor, DoctorArgs)
