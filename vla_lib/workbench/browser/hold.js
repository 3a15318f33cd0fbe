// The hold-to-run field: while a person holds its space bar, or a button of a gamepad, it says so ten times a second.
// A button counts once it has been seen released: one that is jammed, or a switch that is on, holds nothing.

const EVERY_MS = 100;

function render({ model, el }) {
  const field = document.createElement("div");
  field.className = "vla-hold";
  field.tabIndex = 0;
  field.style.cssText = `width: 25em; margin: 2px; text-align: center; font-size: 13px; line-height: 26px;
    border: 1px solid #8c8c8c; border-radius: 3px; cursor: pointer`;
  el.append(field);
  let down = false;
  const released = new Set();

  const key = (event) => {
    if (event.code !== "Space") return;
    event.preventDefault(); // the page would scroll
    event.stopPropagation(); // the notebook has commands of its own
    down = event.type === "keydown";
  };
  field.addEventListener("keydown", key);
  field.addEventListener("keyup", key);
  field.addEventListener("blur", () => (down = false)); // its release would go elsewhere

  const pressed = () => {
    let any = false;
    for (const pad of navigator.getGamepads()) {
      for (const [number, button] of (pad ? pad.buttons : []).entries()) {
        const name = `${pad.index}/${number}`;
        if (!button.pressed) released.add(name);
        else if (released.has(name)) any = true;
      }
    }
    return any;
  };

  const tick = () => {
    const held = document.visibilityState === "visible" && [down, pressed()].some(Boolean);
    field.dataset.held = held;
    field.style.background = held ? "#009e73" : "";
    field.style.color = held ? "white" : "";
    field.textContent = held ? "held: the robot may move" : "click here and hold the space bar, or a gamepad's button";
    if (held) model.send("hold");
  };
  tick();
  const timer = setInterval(tick, EVERY_MS);
  return () => clearInterval(timer);
}

export default { render };
