"""The drawn scene: a MuJoCo model with five cameras, dressed as a `World`. Lengths are mm; nothing here has dynamics.

A silicone block stands on a bench; a round white sticker with a coloured ring and a blue yaw bar marks the target. The
needle hangs from a green hub. Views 1 to 4 look from four sides at 40 degrees of elevation, View5 rides on the tool.
The membrane is not drawn at all.
"""

import colorsys

import mujoco
import numpy as np
from numpy.typing import ArrayLike
from scipy.spatial.transform import Rotation

from needle_rig.world import CENTRE_XY_MM, SURFACE_Z_MM, VIEWS, World

CAMERA_DISTANCE_MM = 120.0
CAMERA_ELEVATION_DEG = 40.0
CAMERA_AZIMUTHS_DEG = (40.0, 140.0, 220.0, 320.0)
LOOK_AT_HEIGHT_MM = 6.0  # over the surface
_FOVY_DEG = 22.0
_HAND_FOVY_DEG = 46.0
_HAND_PLACE_MM = (-38.0, 0.0, 42.0)  # in the tool frame, which begins at the tip
_HAND_LOOKS_AT_MM = (4.0, 0.0, -6.0)

# Marks on the silicone (x, y, radius in mm, on the phantom), so that its surface is not blank; the target moves, they
# do not.
_SPECKS = (
    ((-22, -20, 1.1), (-23, 6, 0.8), (-13, 23, 1.0), (3, -23, 0.9))
    + ((16, -22, 1.2), (23, -5, 0.8), (22, 17, 1.1), (4, 23, 0.8))
)  # fmt: skip

_XML = """
<mujoco model="needle insertion rig">
  <visual>
    <global offwidth="2048" offheight="1536"/>
    <quality shadowsize="0" offsamples="0" numslices="24" numstacks="4"/>
    <map znear="0.05" zfar="20"/>
    <headlight ambient="0.35 0.35 0.35" diffuse="0.15 0.15 0.15" specular="0 0 0"/>
  </visual>
  <statistic extent="100" center="{cx} {cy} {sz}"/>
  <asset>
    <material name="bench" rgba="0.40 0.41 0.44 1" specular="0.1" shininess="0.1"/>
    <material name="tile" rgba="0.31 0.33 0.37 1" specular="0.1" shininess="0.1"/>
    <material name="silicone" specular="0.25" shininess="0.4"/>
    <material name="speck" rgba="0.62 0.60 0.55 1" specular="0.1" shininess="0.1"/>
    <material name="paper" rgba="0.97 0.97 0.95 1" specular="0.05" shininess="0"/>
    <material name="ring" rgba="0.9 0.1 0.1 1" specular="0.05" shininess="0"/>
    <material name="bar" rgba="0.1 0.2 0.8 1" specular="0.05" shininess="0"/>
    <material name="steel" rgba="0.30 0.31 0.34 1" specular="0.8" shininess="0.7"/>
    <material name="hub" rgba="0.10 0.85 0.35 1" specular="0.3" shininess="0.5"/>
    <material name="holder" rgba="0.16 0.16 0.18 1" specular="0.3" shininess="0.4"/>
    <material name="clamp" rgba="0.20 0.21 0.24 1" specular="0.3" shininess="0.3"/>
  </asset>
  <worldbody>
    <!-- near things first: what lies behind them is then rejected by depth before it is shaded -->
    <light name="lamp" pos="{cx} {cy} 300" dir="0 0 -1" directional="true" diffuse="0.7 0.7 0.7"
           specular="0.2 0.2 0.2" castshadow="false"/>
    <body name="target" mocap="true" pos="{cx} {cy} {sz}">
      <geom type="cylinder" size="7.6 0.05" pos="0 0 0.05" material="paper"/>
      <geom type="box" size="7.5 2.2 0.05" pos="12.5 0 0.10" material="bar"/>
      <geom type="cylinder" size="6.0 0.05" pos="0 0 0.20" material="ring"/>
      <geom type="cylinder" size="3.0 0.05" pos="0 0 0.30" material="paper"/>
      <geom type="cylinder" size="1.0 0.05" pos="0 0 0.40" material="ring"/>
    </body>
    <body name="tool" mocap="true" pos="{cx} {cy} {start}">
      <geom type="ellipsoid" size="0.55 0.55 1.6" pos="0 0 1.6" material="steel"/>
      <geom type="cylinder" size="0.55 7" pos="0 0 8.6" material="steel"/>
      <geom type="cylinder" size="2.2 4" pos="0 0 18" material="hub"/>
      <geom type="box" size="1.2 0.5 4" pos="2.6 0 18" material="paper"/>
      <geom type="cylinder" size="5 12" pos="0 0 34" material="holder"/>
      <camera name="View5" pos="{hand}" fovy="{hand_fovy}"/>
    </body>
    <body name="phantom" mocap="true" pos="{cx} {cy} {sz}">
      <geom type="box" size="26 26 10" pos="0 0 -10" material="silicone"/>
      <geom type="box" size="4 9 12" pos="30 0 -14" material="clamp"/>
      <geom type="box" size="4 9 12" pos="-30 0 -14" material="clamp"/>
      {specks}
    </body>
    <body name="ground" pos="{cx} {cy} {bench}">
      {tiles}
      <geom type="box" size="250 250 5" material="bench"/>
    </body>
    {cameras}
  </worldbody>
</mujoco>
"""


def _look(place: np.ndarray, at: np.ndarray) -> Rotation:
    """The rotation of a MuJoCo camera (x right, y up, looks along -z) at `place` that looks at `at`, upright."""
    back = (place - at) / np.linalg.norm(place - at)
    right = np.cross([0.0, 0.0, 1.0], back)
    right /= np.linalg.norm(right)
    return Rotation.from_matrix(np.stack([right, np.cross(back, right), back], axis=1))


def camera_poses() -> list[tuple[np.ndarray, Rotation]]:
    """Nominal place (mm; View5 in the tool frame) and rotation of each of the five cameras."""
    at = np.array([*CENTRE_XY_MM, SURFACE_Z_MM + LOOK_AT_HEIGHT_MM])
    poses = []
    e = np.radians(CAMERA_ELEVATION_DEG)
    for a in np.radians(CAMERA_AZIMUTHS_DEG):
        place = at + CAMERA_DISTANCE_MM * np.array([np.cos(a) * np.cos(e), np.sin(a) * np.cos(e), np.sin(e)])
        poses.append((place, _look(place, at)))
    hand = np.asarray(_HAND_PLACE_MM)
    poses.append((hand, _look(hand, np.asarray(_HAND_LOOKS_AT_MM))))
    return poses


class Scene:
    """The MuJoCo model, its data and a drawing context, which belongs to the thread that made it.

    `show` dresses it as a world, `place_tool` moves the needle, `picture` draws.
    """

    def __init__(self, width: int, height: int):
        cx, cy = CENTRE_XY_MM
        chessboard = [(40 * i, 40 * j) for i in range(-2, 3) for j in range(-2, 3) if (i + j) % 2 == 0 and (i or j)]
        tile = '<geom type="box" size="20 20 0.2" pos="{} {} 5" material="tile"/>'
        tiles = "\n".join(tile.format(x, y) for x, y in chessboard)
        speck = '<geom type="cylinder" size="{r} 0.05" pos="{x} {y} 0" material="speck"/>'
        specks = "\n".join(speck.format(x=x, y=y, r=r) for x, y, r in _SPECKS)
        cameras = "\n".join(f'<camera name="{view}" fovy="{_FOVY_DEG}"/>' for view in VIEWS[:4])
        heights = {"sz": SURFACE_Z_MM, "bench": SURFACE_Z_MM - 31, "start": SURFACE_Z_MM + 20}
        hand = {"hand": " ".join(map(str, _HAND_PLACE_MM)), "hand_fovy": _HAND_FOVY_DEG}
        xml = _XML.format(cx=cx, cy=cy, cameras=cameras, tiles=tiles, specks=specks, **heights, **hand)
        self.model = mujoco.MjModel.from_xml_string(xml)
        self.data = mujoco.MjData(self.model)
        self._renderer = mujoco.Renderer(self.model, height, width)
        for effect in ("SHADOW", "REFLECTION", "SKYBOX"):  # three passes that the views do without
            self._renderer.scene.flags[getattr(mujoco.mjtRndFlag, f"mjRND_{effect}")] = 0
        target = self.model.body("target")
        geoms = [self.model.geom(target.geomadr[0] + k) for k in range(target.geomnum[0])]
        self._printed = [(geom, geom.size[:2].copy(), float(geom.pos[0])) for geom in geoms]
        self._bench_rgb = {name: self.model.material(name).rgba[:3].copy() for name in ("bench", "tile")}

    def show(self, world: World) -> None:
        """Colours, light, cameras, phantom and target of `world`."""
        looks, model = world.looks, self.model
        model.material("silicone").rgba[:3] = looks.silicone_rgb
        model.material("ring").rgba[:3] = colorsys.hsv_to_rgb(looks.ring_hue, 0.9, 0.85)
        model.material("hub").rgba[:3] = looks.hub_rgb
        for geom, printed, off_mm in self._printed:
            geom.size[:2], geom.pos[0] = looks.target_scale * printed, looks.target_scale * off_mm
        for name, rgb in self._bench_rgb.items():
            model.material(name).rgba[:3] = np.clip(rgb * looks.table_level, 0, 1)
        lamp = model.light("lamp")
        lamp.dir[:] = -looks.light_mm / np.linalg.norm(looks.light_mm)
        lamp.diffuse[:] = 0.7 * looks.light_level * looks.light_rgb
        model.vis.headlight.ambient[:] = looks.ambient_level
        for i, (view, (place, turn)) in enumerate(zip(VIEWS, camera_poses(), strict=True)):
            camera = model.camera(view)
            camera.pos[:] = place + looks.camera_place_mm[i]
            camera.quat[:] = (turn * Rotation.from_rotvec(looks.camera_turn_deg[i], degrees=True)).as_quat(
                scalar_first=True
            )
        (x, y), z = np.asarray(CENTRE_XY_MM) + looks.phantom_xy_mm, world.surface_z_mm
        self._put("phantom", (x, y, z), Rotation.from_euler("Z", looks.phantom_yaw_deg, degrees=True))
        self._put("target", (*world.target_xy_mm, z), Rotation.from_euler("Z", world.target_yaw_deg, degrees=True))
        self.place_tool(np.asarray(world.start_mm), np.asarray(world.start_rotvec_deg))

    def place_tool(self, position_mm: np.ndarray, rotvec_deg: np.ndarray) -> None:
        """Put the needle's tip at (3,) mm with a (3,) rotation vector in degrees."""
        self._put("tool", position_mm, Rotation.from_rotvec(rotvec_deg, degrees=True))
        mujoco.mj_kinematics(self.model, self.data)
        mujoco.mj_camlight(self.model, self.data)

    def picture(self, view: str, position_mm: np.ndarray, rotvec_deg: np.ndarray) -> np.ndarray:
        """One (H, W, 3) uint8 picture with the tip at (3,) mm, rotation vector (3,) degrees."""
        self.place_tool(position_mm, rotvec_deg)
        self._renderer.update_scene(self.data, camera=view)
        return self._renderer.render()

    def close(self) -> None:
        """Free the drawing context; twice does no harm."""
        self._renderer.close()

    def _put(self, name: str, place: ArrayLike, turn: Rotation) -> None:
        mocap = self.model.body(name).mocapid[0]
        self.data.mocap_pos[mocap], self.data.mocap_quat[mocap] = place, turn.as_quat(scalar_first=True)
