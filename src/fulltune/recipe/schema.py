from __future__ import annotations

from fulltune.recipe.fields import Recipe
from fulltune.recipe.model import PlainSettings
from fulltune.recipe.tasks import FACTS


def recipe_schema() -> PlainSettings:
    """Return the JSON schema of a recipe file, including short forms such as `method: lora`."""
    schema = Recipe.model_json_schema()
    blocks, settings = schema["$defs"], schema["properties"]
    train = blocks["TrainBlock"]["properties"]
    settings["task"]["enum"] = list(FACTS)
    settings["model"]["anyOf"] = [{"type": "string"}, {"$ref": settings["model"].pop("$ref")}]
    train["report_to"]["anyOf"] = [{"type": "string"}, {"type": train["report_to"].pop("type")}]
    for method in (settings["method"], settings["methods"]["items"]):
        kinds = {"enum": list(method.pop("discriminator")["mapping"])}
        method["anyOf"] = [kinds, {"type": "object", "oneOf": method.pop("oneOf")}]
    settings["methods"]["items"]["anyOf"][1]["required"] = blocks["FullMethod"].pop("required")
    blocks["FullMethod"]["properties"]["train"]["$ref"] = settings["train"]["$ref"]
    blocks["MixedFile"]["required"].remove("weight")
    for setting in settings.values():
        if isinstance(setting.get("default"), dict):
            del setting["default"]  # an editor would insert all of its settings
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema}
