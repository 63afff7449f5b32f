"""The package `control_msgs` of ROS 2, which has no wheel, built from the definition of its action `GripperCommand`."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

STATE = "float64 position\nfloat64 effort\nbool stalled\nbool reached_goal\n"
FILES = {
    "msg/GripperCommand.msg": "float64 position\nfloat64 max_effort\n",
    "action/GripperCommand.action": f"GripperCommand command\n---\n{STATE}---\n{STATE}",
    "package.xml": """<package format="3">
  <name>control_msgs</name><version>0.0.1</version><description>One action of control_msgs</description>
  <maintainer email="nobody@example.com">nobody</maintainer><license>Apache-2.0</license>
  <buildtool_depend>ament_cmake</buildtool_depend>
  <buildtool_depend>rosidl_default_generators</buildtool_depend>
  <depend>action_msgs</depend>
  <member_of_group>rosidl_interface_packages</member_of_group>
  <export><build_type>ament_cmake</build_type></export>
</package>
""",
    "CMakeLists.txt": """cmake_minimum_required(VERSION 3.12)
project(control_msgs)
find_package(ament_cmake REQUIRED)
find_package(rosidl_default_generators REQUIRED)
find_package(action_msgs REQUIRED)
# The wheels name header files of the machine that built them.
foreach(package action_msgs builtin_interfaces service_msgs unique_identifier_msgs)
  set_target_properties(${package}::${package}__rosidl_generator_py PROPERTIES INTERFACE_INCLUDE_DIRECTORIES "")
endforeach()
rosidl_generate_interfaces(control_msgs "msg/GripperCommand.msg" "action/GripperCommand.action")
ament_package()
""",
}


def missing() -> str | None:
    """Why the package cannot be built here; None: it can."""
    tools = [tool for tool in ("cmake", "c++") if shutil.which(tool) is None]
    prefix = Path(sys.prefix)
    packages = [name for name in ("rosidl_default_generators", "ament_cmake") if not (prefix / "share" / name).is_dir()]
    if tools or packages:
        return f"needs {', '.join(tools + packages)}: the dependency group `ros-build`, CMake and a compiler"
    return None


def build(folder: Path) -> dict[str, str]:
    """Build and install the package below `folder`; return the environment variables of those who use it."""
    for name, content in FILES.items():
        (folder / "src" / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / "src" / name).write_text(content)
    install, prefix = folder / "install", sys.prefix
    environment = {**os.environ, "PATH": f"{prefix}/bin:{os.environ['PATH']}", "AMENT_PREFIX_PATH": prefix}
    configure = [
        "cmake", "-S", str(folder / "src"), "-B", str(folder / "build"), f"-DCMAKE_PREFIX_PATH={prefix}",
        f"-DCMAKE_INSTALL_PREFIX={install}", f"-DPython3_EXECUTABLE={sys.executable}", "-DBUILD_TESTING=OFF",
    ]  # fmt: skip
    for command in (configure, ["cmake", "--build", str(folder / "build"), "--target", "install", "-j", "2"]):
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    packages = next(install.glob("lib/python*/site-packages"))
    paths = os.pathsep.join([str(packages), *filter(None, [os.environ.get("PYTHONPATH")])])
    libraries = os.pathsep.join([str(install / "lib"), *filter(None, [os.environ.get("LD_LIBRARY_PATH")])])
    prefixes = f"{install}{os.pathsep}{prefix}"
    return {"PYTHONPATH": paths, "LD_LIBRARY_PATH": libraries, "AMENT_PREFIX_PATH": prefixes}
