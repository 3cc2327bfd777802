"""Trains: `python main.py [PRESET] [--setting value ...]`, or `sh run.sh [PRESET] [--setting value ...]` for all GPUs.

Merges the command line into the preset's settings, sets up the device and the data, and hands off to the trainer. What
is heavy to import is imported once the settings are known to be right.
"""

from command_line import in_short, read_config, start


def main(arguments):
    config = read_config(arguments)

    from distributed import print0, set_up, world_size

    with set_up(**vars(config)) as device:
        from build import check_run, read_data
        from trainer import TRAINERS

        print0(f"{config.run_name} on {world_size()} x {device.type}\n{in_short(config)}")
        check_run(config, device)
        TRAINERS[config.trainer](config, read_data(config), device).train()


if __name__ == "__main__":
    start(main, resumable=True)
