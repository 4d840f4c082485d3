"""What is built on the package: verify, bench, demo, axolotl configs. No part of loading or training imports these."""
