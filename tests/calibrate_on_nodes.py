"""./launch.sh calibrate with little to measure: for tests, as a rank that torchrun has started."""

from __future__ import annotations

import sys

from experiments.__main__ import main
from experiments.calibrate import device_times, message_times, models

device_times.SIZES["cpu"] = device_times.Sizes(
    ((32, 32, 32), (64, 64, 64), (128, 32, 64)), (2**12, 2**18, 2**20), ()
)
message_times.SIZES["cpu"] = (256, 2**12, 2**16)
for name, (layers, width, _, batch, pieces, others) in models.SHAPES.items():
    models.SHAPES[name] = (layers, width // 2, 32, batch, pieces, others)

if __name__ == "__main__":
    sys.exit(main(["calibrate", *sys.argv[1:]]))
