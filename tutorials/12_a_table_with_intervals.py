# ---
# jupyter:
#   jupytext:
#     formats: ipynb,py:percent
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # 12. A table, and intervals that can be trusted
#
# From a DataFrame to calibrated intervals with the estimators of `pyro_apd.sklearn`. They follow scikit-learn's
# contract, so that pipelines, cross-validation and inspection work as for any estimator. Behind `fit` are a Bayesian
# neural network, a sampler chosen by the size of the data, and a generator distilled from the chain.

# %%
import os

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from sklearn.compose import make_column_transformer
from sklearn.datasets import load_diabetes, load_wine
from sklearn.inspection import permutation_importance
from sklearn.model_selection import cross_val_predict, train_test_split
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import OneHotEncoder

import pyro_apd as apd
from pyro_apd.sklearn import BNNClassifier, BNNRegressor

QUICK = os.environ.get("PYRO_APD_TUTORIAL_QUICK") == "1"  # a smoke test: everything runs, and little of it means much
quick = {"num_samples": 10, "warmup_steps": 10, "thinning": 2, "num_networks": 20} if QUICK else {}
settings = {"random_state": 0, "progress": False} | quick

# %% [markdown]
# ## Fit and predict
#
# The diabetes data have 442 patients, ten measurements and how far the disease went in a year. Standardisation of
# inputs and targets is inside. Bars are switched off here to keep the page short.

# %%
X, y = load_diabetes(return_X_y=True, as_frame=True, scaled=False)
X_train, X_test, y_train, y_test = train_test_split(X, y, random_state=0)
regressor = BNNRegressor(noise="by_input", **settings).fit(X_train, y_train)
mean, sd, interval = regressor.predict(X_test, return_std=True, return_interval=0.9)
pd.DataFrame({"observed": y_test, "mean": mean, "sd": sd, "from": interval[:, 0], "to": interval[:, 1]}).head()

# %%
samples = regressor.sample_y(X_test, 100)
print("RMSE              ", round(apd.metrics.root_mean_squared_error(mean, y_test), 1))
print("CRPS              ", round(apd.metrics.crps(samples.T, y_test), 1))
print("in 90 % intervals ", round(apd.metrics.interval_coverage(*interval.T, y_test), 2))
print("bytes of the file ", regressor.distilled_.num_bytes)

# %% [markdown]
# ## Are the intervals calibrated?
#
# Each interval of probability p should hold a share p of the targets. One test set of 111 patients leaves that share
# uncertain, which the grey band shows. Predictions for all patients by cross-validation narrow it. With
# `noise="by_input"` the noise is an output of the network; with `"constant"` it is one number.

# %%
levels = [0.1, 0.3, 0.5, 0.7, 0.8, 0.9, 0.95]


def intervals_of(regressor, X):
    return {level: regressor.predict(X, return_interval=level)[1] for level in levels}


constant = BNNRegressor(noise="constant", **settings).fit(X_train, y_train)
by_name = {"noise by input": intervals_of(regressor, X_test), "constant noise": intervals_of(constant, X_test)}
figure, ax = plt.subplots(figsize=(4.6, 3.8), layout="constrained")
_ = apd.diagnostics.plots.calibration_of_intervals(by_name, y_test, ax)

# %% [markdown]
# ## Along one measurement
#
# Body mass index from the lowest to the highest, with everything else at its median. The data are those of all
# patients, who differ in the other measurements, too.

# %%
line = pd.DataFrame([X_train.median()] * 100).assign(bmi=np.linspace(X["bmi"].min(), X["bmi"].max(), 100))
bands = {level: regressor.predict(line, return_interval=level)[1] for level in (0.5, 0.9)}
figure, ax = plt.subplots(figsize=(5.5, 3.6), layout="constrained")
names = {"xlabel": "body mass index", "ylabel": "progression"}
patients = (X_train["bmi"], y_train)
_ = apd.diagnostics.plots.regression_band(line["bmi"], regressor.predict(line), bands, ax, data=patients, **names)

# %% [markdown]
# ## Why is a prediction uncertain?
#
# The epistemic part is from not knowing the weights: it shrinks with more data, and grows away from them. The aleatoric
# part is noise, and stays.

# %%
outside = X_test.assign(bmi=X_test["bmi"] + 40)
for name, rows in {"patients": X_test, "40 more body mass index": outside}.items():
    parts = regressor.predict_uncertainty(rows)
    print(f"{name:25s} epistemic {parts['epistemic_std'].mean():6.1f}   aleatoric {parts['aleatoric_std'].mean():6.1f}")

# %% [markdown]
# ## scikit-learn's tools
#
# Text goes through an encoder of your own. Here the strength of the wine's colour is a word, and the labels are words.

# %%
wine = load_wine(as_frame=True)
words = pd.cut(wine.data["color_intensity"], 3, labels=["pale", "middle", "deep"]).astype(str)
table = wine.data[["alcohol", "flavanoids", "proline"]].assign(colour=words)
labels = np.array(["Barolo", "Grignolino", "Barbera"])[wine.target]
pipeline = make_pipeline(
    make_column_transformer((OneHotEncoder(), ["colour"]), remainder="passthrough"),
    BNNClassifier(**settings),
)
predicted = cross_val_predict(pipeline, table, labels, cv=2 if QUICK else 5)
print("accuracy in cross-validation", round(float((predicted == labels).mean()), 3))

# %%
pipeline.fit(table, labels)
importance = permutation_importance(pipeline, table, labels, n_repeats=2 if QUICK else 10, random_state=0)
pd.Series(importance.importances_mean, index=table.columns).sort_values(ascending=False).round(3)

# %% [markdown]
# Which wines does it doubt? The mutual information is the part of the doubt that further data could remove.

# %%
encoded = pipeline[:-1].transform(table)
doubt = pd.DataFrame(pipeline[-1].predict_uncertainty(encoded)).assign(label=labels, predicted=pipeline.predict(table))
doubt.sort_values("mutual_information", ascending=False).head().round(3)

# %% [markdown]
# ## One safe file
#
# `save` writes parameters, scaling and the posterior into one safetensors file; nothing in it is executed by `load`.
# The rest of the library takes `posterior_`, `model_` and `mcmc_`.

# %%
regressor.save("diabetes.safetensors")
loaded = BNNRegressor.load("diabetes.safetensors")
print("same predictions:", bool((loaded.predict(X_test) == mean).all()))
print("bytes:", os.path.getsize("diabetes.safetensors"))
os.remove("diabetes.safetensors")
