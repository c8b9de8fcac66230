# SPDX-License-Identifier: Apache-2.0
"""Every method of every service, called with grpcio: gRPC's C core, which is below the clients of Python, C++, Ruby and PHP.

    calls.py DRIVER

`make test-python` runs it as root, with the packages of requirements.txt.
"""

import os
import subprocess
import sys
import tempfile
import time
import unittest

import grpc
import grpc_tools

# Here grpcio looks for .proto files, of which it makes stubs in memory.
sys.path += ["proto", os.path.join(os.path.dirname(grpc_tools.__file__), "_proto")]
csi, stubs = grpc.protos_and_services("csi/v1/csi.proto")

# What docs/troubleshooting.md tells the authors of such clients.
LOCALHOST = [("grpc.default_authority", "localhost")]
SPEC = {"mountSpec": '{"kind":"nfs","nfs":{"host":"192.0.2.1","path":"/images"}}'}
READER = {"mount": {}, "access_mode": {"mode": "MULTI_NODE_READER_ONLY"}}
Code = grpc.StatusCode


class Client:
    """Calls one service, and knows what was not called yet."""

    def __init__(self, service, target, options):
        self.stub = getattr(stubs, f"{service}Stub")(grpc.insecure_channel(target, options))
        self.uncalled = set(csi.DESCRIPTOR.services_by_name[service].methods_by_name)

    def call(self, method, **fields):
        self.uncalled.discard(method)
        return getattr(self.stub, method)(getattr(csi, f"{method}Request")(**fields), timeout=30)

    def refusal(self, method, **fields):
        try:
            answer = self.call(method, **fields)
        except grpc.RpcError as error:
            return error.code(), error.details()
        raise AssertionError(f"{method} was not refused: {answer}")


class Calls(unittest.TestCase):
    @classmethod
    def setUpClass(cls):
        cls.directory = cls.enterClassContext(tempfile.TemporaryDirectory())
        cls.start("controller")
        cls.start("node", "--node-id=node-1", f"--data-dir={cls.directory}/data")

    @classmethod
    def start(cls, role, *arguments):
        socket = f"{cls.directory}/{role}.sock"
        common = ["--driver-name=python.csi.dev", "--log-level=error", f"--endpoint=unix://{socket}"]
        driver = subprocess.Popen([DRIVER, role, *common, *arguments])
        cls.addClassCleanup(driver.wait)
        cls.addClassCleanup(driver.terminate)
        for _ in range(600):
            if os.path.exists(socket):
                return
            assert driver.poll() is None, "the driver ended"
            time.sleep(0.05)
        raise AssertionError("the driver does not listen")

    def client(self, service, role, options=LOCALHOST):
        return Client(service, f"unix://{self.directory}/{role}.sock", options)

    def test_the_identity_service_answers(self):
        identity = self.client("Identity", "controller")
        self.assertEqual(identity.call("GetPluginInfo").name, "python.csi.dev")
        [capability] = identity.call("GetPluginCapabilities").capabilities
        self.assertEqual(capability.service.type, csi.PluginCapability.Service.CONTROLLER_SERVICE)
        self.assertTrue(identity.call("Probe").ready.value)
        self.assertEqual(identity.uncalled, set())

    def test_the_controller_service_creates_checks_and_forgets_a_volume(self):
        controller = self.client("Controller", "controller")
        self.assertEqual(len(controller.call("ControllerGetCapabilities").capabilities), 2)
        wanted = {"name": "tools", "volume_capabilities": [READER]}
        created = controller.call("CreateVolume", parameters=SPEC, capacity_range={"required_bytes": 1 << 40}, **wanted)
        self.assertEqual((created.volume.volume_id, created.volume.capacity_bytes), ("tools", 1 << 40))
        self.assertEqual(dict(created.volume.volume_context), SPEC)
        checked = controller.call("ValidateVolumeCapabilities", volume_id="tools", volume_capabilities=[READER])
        self.assertEqual(dict(checked.confirmed.volume_context), SPEC)
        refused = controller.refusal("CreateVolume", parameters=SPEC, **wanted)
        self.assertEqual(refused, (Code.ALREADY_EXISTS, "volume tools exists with another size or other parameters"))
        controller.call("DeleteVolume", volume_id="tools")
        code, _ = controller.refusal("ValidateVolumeCapabilities", volume_id="tools", volume_capabilities=[READER])
        self.assertEqual(code, Code.NOT_FOUND)
        self.assertEqual(controller.uncalled, set())

    def test_the_node_service_refuses_in_words_what_it_cannot_do(self):
        node = self.client("Node", "node")
        self.assertEqual(node.call("NodeGetInfo").node_id, "node-1")
        self.assertEqual(len(node.call("NodeGetCapabilities").capabilities), 6)
        staging, target = {"staging_target_path": f"{self.directory}/staging"}, {"target_path": f"{self.directory}/pod"}
        volume = {"volume_id": "tools", "volume_capability": READER}
        # Not only ASCII, and a character that gRPC escapes in messages.
        code, message = node.refusal("NodeStageVolume", volume_context={"imäge%": "tools.sqsh"}, **volume, **staging)
        self.assertEqual((code, message.split(";")[0]), (Code.INVALID_ARGUMENT, 'imäge%: unknown parameter "imäge%"'))
        refused = node.refusal("NodePublishVolume", volume_context=SPEC, **volume, **target)
        self.assertEqual(refused, (Code.FAILED_PRECONDITION, "staging_target_path is required: stage the volume first"))
        code, _ = node.refusal("NodeGetVolumeStats", volume_id="tools", volume_path=target["target_path"])
        self.assertEqual(code, Code.NOT_FOUND)
        code, _ = node.refusal("NodeGetVolumeHealth", volume_id="tools")
        self.assertEqual(code, Code.NOT_FOUND)
        node.call("NodeUnpublishVolume", volume_id="tools", **target)
        node.call("NodeUnstageVolume", volume_id="tools", **staging)
        self.assertEqual(node.uncalled, set())

    def test_without_the_option_no_call_reaches_the_driver(self):
        # Where this is answered, the row in docs/troubleshooting.md can go, and LOCALHOST with it.
        for service, method in [("Identity", "GetPluginInfo"), ("Node", "NodeGetInfo")]:
            code, message = self.client(service, "node", options=[]).refusal(method)
            self.assertEqual(code, Code.INTERNAL)
            # PROTOCOL_ERROR, by HTTP's layer: the driver's own refusals have words.
            self.assertRegex(message, r"RST_STREAM with error code 1\b")

    def test_without_the_option_a_path_of_one_word_does(self):
        self.addCleanup(os.chdir, os.getcwd())
        os.chdir(self.directory)
        self.assertEqual(Client("Node", "unix:node.sock", []).call("NodeGetInfo").node_id, "node-1")


if __name__ == "__main__":
    DRIVER = os.path.abspath(sys.argv.pop())
    unittest.main(verbosity=2)
