// Search on pages opened from a disk, where browsers start no workers: the script of the worker
// runs in a hidden frame. The name is the one by which the offline plugin finds a stand-in.
if (location.protocol === "file:") {
  window.IFrameWorker = window.Worker = class extends EventTarget {
    constructor(url) {
      super();
      const frame = document.createElement("iframe");
      this.inside = new Promise((done) => {
        frame.onload = () => {
          const inside = frame.contentWindow, script = inside.document.createElement("script");
          inside.postMessage = (data) => this.dispatchEvent(new MessageEvent("message", { data }));
          script.onload = () => done(inside);
          script.src = url;
          inside.document.body.append(script);
        };
      });
      frame.hidden = true;
      document.body.append(frame);
    }
    async postMessage(data) {
      (await this.inside).dispatchEvent(new MessageEvent("message", { data }));
    }
  };
}
