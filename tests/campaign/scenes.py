"""The scenes of all mains; each is made once, by the main itself, and damaged in copies."""

from tests.campaign import files_esm, files_halting, files_qstar, files_reoac

SCENES = {
    scene.main: scene
    for scene in (files_reoac.SCENE, files_halting.SCENE, files_qstar.SCENE, files_esm.SCENE)
}
