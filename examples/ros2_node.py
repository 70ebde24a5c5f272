"""A ROS 2 node that says where its camera is, by asking a service (`pairvpr serve`).

`python examples/ros2_node.py --ros-args -p url:=http://127.0.0.1:8000 -r image/compressed:=/camera/image/compressed`

It takes `sensor_msgs/CompressedImage` from `image/compressed` and publishes `sensor_msgs/NavSatFix` on `place/fix` and
the matching photo's path on `place/path`. With `prior_radius_m` above 0, only photos at most that far from the last
position on `prior/fix` are searched. While an image is being answered, the newest that arrives waits, and older ones
are dropped. The project's tests run it with a stub of rclpy's interface; it has not run on a robot.
"""

from __future__ import annotations

import math
import os
import queue
import threading
from typing import Any

import rclpy  # pyright: ignore[reportMissingImports]
from rclpy.executors import ExternalShutdownException  # pyright: ignore[reportMissingImports]
from rclpy.node import Node  # pyright: ignore[reportMissingImports]
from rclpy.qos import qos_profile_sensor_data  # pyright: ignore[reportMissingImports]
from sensor_msgs.msg import CompressedImage, NavSatFix, NavSatStatus  # pyright: ignore[reportMissingImports]
from std_msgs.msg import String  # pyright: ignore[reportMissingImports]

from pairvpr.client import Answer, Client, Conditions, ServiceError

UNKNOWN_SPREAD_M = 25.0
"""Taken as the standard deviation where one photo alone decided, so that its spread says nothing."""


class PlaceNode(Node):
    """Parameters: `url`, `index`, `prior_radius_m`, `deadline_s`. The token is in the environment, PAIRVPR_TOKEN."""

    def __init__(self) -> None:
        super().__init__("pairvpr")
        url = self.declare_parameter("url", "http://127.0.0.1:8000").value
        self._index = self.declare_parameter("index", "").value
        self._prior_radius_m = self.declare_parameter("prior_radius_m", 0.0).value
        deadline_s = self.declare_parameter("deadline_s", 5.0).value
        self._client = Client(url, token=os.environ.get("PAIRVPR_TOKEN"), deadline_s=deadline_s)
        self._prior: tuple[float, float] | None = None
        self._fixes = self.create_publisher(NavSatFix, "place/fix", 10)
        self._paths = self.create_publisher(String, "place/path", 10)
        self.create_subscription(CompressedImage, "image/compressed", self._on_image, qos_profile_sensor_data)
        self.create_subscription(NavSatFix, "prior/fix", self._on_prior, qos_profile_sensor_data)
        self._newest: queue.Queue[Any] = queue.Queue(maxsize=1)
        self._asking = threading.Thread(target=self._ask_always, daemon=True)
        self._asking.start()

    def destroy_node(self) -> None:
        """End the thread, then the node."""
        self._replace(None)
        self._asking.join()
        super().destroy_node()

    def _on_image(self, image: Any) -> None:
        self._replace(image)

    def _on_prior(self, fix: Any) -> None:
        has_fix = fix.status.status >= NavSatStatus.STATUS_FIX
        self._prior = (fix.latitude, fix.longitude) if has_fix else None

    def _replace(self, image: Any) -> None:
        """Put an image where the thread takes it, in the place of one that still waits."""
        while True:
            try:
                self._newest.put_nowait(image)
                return
            except queue.Full:
                try:
                    self._newest.get_nowait()
                except queue.Empty:
                    continue

    def _ask_always(self) -> None:
        while (image := self._newest.get()) is not None:
            try:
                answer = self._client.locate(bytes(image.data), **self._conditions())
            except ServiceError as error:
                self.get_logger().warning(f"no answer ({error.code}): {error}")
                continue
            self._publish(image.header, answer)

    def _conditions(self) -> Conditions:
        conditions: Conditions = {"k": 1}
        if self._index:
            conditions["index"] = self._index
        if self._prior is not None and self._prior_radius_m > 0:
            conditions |= {"near": self._prior, "radius_m": self._prior_radius_m}
        return conditions

    def _publish(self, header: Any, answer: Answer) -> None:
        """A fix at the time and in the frame of the image; without one if the photo is not in the map."""
        fix, position = NavSatFix(), answer.position
        fix.header = header
        fix.status.status = NavSatStatus.STATUS_NO_FIX
        fix.latitude = fix.longitude = fix.altitude = math.nan
        fix.position_covariance_type = NavSatFix.COVARIANCE_TYPE_UNKNOWN
        if answer.answer is not None and position is not None and position.latitude is not None:
            fix.status.status = NavSatStatus.STATUS_FIX
            fix.latitude, fix.longitude = position.latitude, position.longitude
            variance_m2 = (position.spread_m or UNKNOWN_SPREAD_M) ** 2
            fix.position_covariance = [variance_m2, 0.0, 0.0, 0.0, variance_m2, 0.0, 0.0, 0.0, 0.0]
            fix.position_covariance_type = NavSatFix.COVARIANCE_TYPE_APPROXIMATED
        self._fixes.publish(fix)
        self._paths.publish(String(data="" if answer.answer is None else answer.answer.path))


def main() -> None:
    """Run until the program is interrupted."""
    rclpy.init()
    node = PlaceNode()
    try:
        rclpy.spin(node)
    except (KeyboardInterrupt, ExternalShutdownException):
        pass
    finally:
        node.destroy_node()
        rclpy.try_shutdown()


if __name__ == "__main__":
    main()
