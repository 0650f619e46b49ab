"use strict";
(function () {
  var read = function (id) { return JSON.parse(document.getElementById(id).textContent); };
  var samples = read("samples-data"), curves = read("curves-data");
  var all = function (root, selector) {
    return Array.prototype.slice.call(root.querySelectorAll(selector));
  };
  var text = function (value) {
    return value.replace(/&/g, "&amp;").replace(/</g, "&lt;").replace(/>/g, "&gt;");
  };

  /* The same drawing as viewer_svg.cells, for the answers of another step. */
  function cells(marks, side) {
    var kinds = {}, letters = "";
    marks.forEach(function (mark, i) {
      var x = i % side, y = Math.floor(i / side);
      kinds[mark[1]] = (kinds[mark[1]] || "") + "M" + x + " " + y + "h1v1h-1z";
      if (mark[0] && mark[1] !== "path") {
        letters += '<text class="on-' + mark[1] + '" x="' + (x + 0.5) + '" y="' + (y + 0.72) +
          '">' + text(mark[0]) + "</text>";
      }
    });
    return Object.keys(kinds).map(function (kind) {
      return '<path class="' + kind + '" d="' + kinds[kind] + '"/>';
    }).join("") + letters;
  }

  function crosses(right, side) {
    return right.map(function (good, i) {
      var x = i % side + 0.1, y = Math.floor(i / side) + 0.1;
      return good ? "" : "M" + x + " " + y + "l.8 .8m0-.8l-.8 .8";
    }).join("");
  }

  function ready(card, data) {
    var slider = card.querySelector(".steps"), play = card.querySelector(".play");
    var said = card.querySelector(".said"), answer = card.querySelector(".answer");
    var now = card.querySelector(".now"), plot = card.querySelector(".halting");
    var readout = card.querySelector(".readout"), timer = null;
    var shown = data.frames.length - 1;
    var marksOf = function (codes) {
      return codes.map(function (code) { return data.palette[code]; });
    };

    function show(index) {
      var frame = data.frames[index], marks = marksOf(frame.answers);
      shown = index;
      if (data.side) {
        answer.querySelector(".cells").innerHTML = cells(marks, data.side);
        answer.querySelector(".diff").setAttribute("d", crosses(frame.right, data.side));
      } else {
        all(answer, "li").forEach(function (item, i) {
          item.querySelector("span").textContent = marks[i][0];
          item.classList.toggle("wrong", !frame.right[i]);
        });
      }
      said.textContent = frame.said;
      slider.setAttribute("aria-valuetext", frame.said);
      if (now) {
        var last = index === data.frames.length - 1;
        var x = +plot.dataset.x0 + frame.steps * +plot.dataset.dx;
        now.setAttribute("x1", x);
        now.setAttribute("x2", x);
        now.toggleAttribute("hidden", last);
      }
    }

    function stop() {
      clearInterval(timer);
      timer = null;
      play.textContent = "Play";
    }

    if (slider) {
      slider.addEventListener("input", function () { stop(); show(+slider.value); });
      play.addEventListener("click", function () {
        if (timer) { stop(); return; }
        var index = shown >= data.frames.length - 1 ? 0 : shown;
        play.textContent = "Pause";
        var forward = function () {
          slider.value = index;
          show(index);
          index += 1;
          if (index >= data.frames.length) { stop(); }
        };
        timer = setInterval(forward, 600);
        forward();
      });
    }
    var diff = card.querySelector(".differences");
    if (diff) {
      diff.addEventListener("change", function () {
        card.classList.toggle("plain", !diff.checked);
      });
    }
    if (!data.side) { return; }

    /* One cursor over all grids of the card, by pointer or arrow keys. */
    var grids = all(card, "svg.grid"), place = -1;
    function point(next) {
      place = next;
      grids.forEach(function (grid) {
        var cursor = grid.querySelector(".cursor");
        cursor.toggleAttribute("hidden", place < 0);
        cursor.setAttribute("x", Math.max(place, 0) % data.side);
        cursor.setAttribute("y", Math.floor(Math.max(place, 0) / data.side));
      });
      if (place < 0) { readout.textContent = data.hint; return; }
      var mark = function (code) { return data.palette[code][2]; };
      var parts = ["row " + (Math.floor(place / data.side) + 1) + ", column " +
        (place % data.side + 1), "input " + mark(data.input[place]),
        "label " + mark(data.label[place]),
        "answer " + mark(data.frames[shown].answers[place])];
      if (data.steps.length) { parts.push(data.steps[place] + " steps"); }
      if (data.settled.length) { parts.push("settled after " + data.settled[place]); }
      readout.textContent = parts.join(" · ");
    }
    grids.forEach(function (grid) {
      grid.addEventListener("pointermove", function (event) {
        var box = grid.getBoundingClientRect();
        var x = Math.floor((event.clientX - box.left) / box.width * data.side);
        var y = Math.floor((event.clientY - box.top) / box.height * data.side);
        var limit = data.side - 1;
        point(Math.min(Math.max(y, 0), limit) * data.side + Math.min(Math.max(x, 0), limit));
      });
      grid.addEventListener("pointerleave", function () { point(-1); });
      grid.addEventListener("blur", function () { point(-1); });
      grid.addEventListener("keydown", function (event) {
        var move = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1],
          ArrowDown: [0, 1] }[event.key];
        if (!move) { return; }
        event.preventDefault();
        var from = Math.max(place, 0), limit = data.side - 1;
        var x = Math.min(Math.max(from % data.side + move[0], 0), limit);
        var y = Math.min(Math.max(Math.floor(from / data.side) + move[1], 0), limit);
        point(place < 0 ? 0 : y * data.side + x);
      });
    });
  }

  all(document, ".sample").forEach(function (card, i) { ready(card, samples[i]); });

  /* Rolling mean of the training curves. */
  function smooth(values, size) {
    var total = 0;
    return values.map(function (value, i) {
      total += value;
      if (i >= size) { total -= values[i - size]; }
      return total / Math.min(i + 1, size);
    });
  }
  var smoothing = document.querySelector(".smoothing");
  if (smoothing) {
    smoothing.addEventListener("input", function () {
      document.querySelector(".window").textContent = smoothing.value;
      all(document, "svg.curve").forEach(function (plot, i) {
        var d = plot.dataset;
        all(plot, "polyline.mean").forEach(function (line) {
          var curve = curves[i][+line.dataset.series];
          line.setAttribute("points", smooth(curve.y, +smoothing.value).map(function (y, k) {
            return (+d.x0 + curve.x[k] * d.dx).toFixed(1) + "," +
              (+d.y0 + y * d.dy).toFixed(1);
          }).join(" "));
        });
      });
    });
  }
})();
