"""Build file of the ROS 2 package for colcon: `colcon build --packages-select cogvla_bridge`."""

from setuptools import setup

NAME = "cogvla_bridge"

setup(
    name=NAME,
    version="0.1.0",
    packages=[NAME],
    data_files=[
        ("share/ament_index/resource_index/packages", [f"resource/{NAME}"]),
        (f"share/{NAME}", ["package.xml"]),
        (f"share/{NAME}/launch", ["launch/bridge.launch.py"]),
        (f"share/{NAME}/config", ["config/tabletop.yaml"]),
    ],
    install_requires=["setuptools"],
    zip_safe=True,
    description="Lifecycle node between a robot's topics and a cogvla policy server.",
    license="MIT",
    entry_points={"console_scripts": [f"bridge = {NAME}.node:main"]},
)
