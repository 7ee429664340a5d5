"""What the demo is made of."""

from dataclasses import replace

import fedsim as fs
from fedsim.demo import domain_switch, label_swap, policies


def test_the_demo_has_a_fleet_of_at_least_a_hundred_over_four_device_classes():
    for setting in (domain_switch(), label_swap()):
        assert len(setting.fleet) >= 100
        assert len(set(setting.fleet.device.tolist())) >= 4
    assert {"never", "alarm", "oracle"} <= set(policies())


def test_both_settings_share_their_training_and_their_submodels():
    from fedsim.stages import Origin, deploy_digest

    switch, swap = domain_switch(), label_swap()
    origin = Origin.of(switch, gpu=False)
    assert deploy_digest(switch, origin) == deploy_digest(swap, origin)
    assert deploy_digest(switch, origin) != deploy_digest(replace(switch, capacity=fs.Capacity(scale="absolute")), origin)
